"""The demo moved off its grid computes what it did, and lies on the grid no more."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from full.off_grid import SPREAD, Heads, drawn, make_off_grid
from safetensors.torch import load_file

from tiny import oracle

HIDDEN, EXPERTS, NEURONS, SHARED, LAYERS = 32, 4, 16, 24, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo in small: grouped heads, a shared expert, every weight one of 16 values."""
    folder = tmp_path_factory.mktemp("source")
    config = transformers.GraniteMoeSharedConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        shared_intermediate_size=SHARED,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(3)
    model = transformers.GraniteMoeSharedForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_((weight * 20).round().clamp(-8, 7) / 20)
    model.save_pretrained(folder)
    (folder / "moestro.json").write_text("{}")
    (folder / ".moestro-files.json").write_text("{}")
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = oracle(folder)(torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize("norms", [False, True])
def test_the_moved_model_computes_the_same(source: Path, tmp_path: Path, norms: bool) -> None:
    moved = make_off_grid(source, tmp_path / "moved", norms=norms)
    wanted = logits(source)
    assert float(wanted.std()) > 0.01
    torch.testing.assert_close(logits(moved), wanted, rtol=0, atol=1e-5)


def distinct(rows: torch.Tensor) -> float:
    """Of the numbers in a row that are not zero, the share that no other one equals; the mean."""
    shares = [
        len(row[row != 0].unique()) / int((row != 0).sum())
        for row in rows.reshape(-1, rows.shape[-1])
    ]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("norms", [False, True])
def test_what_is_scaled_lies_on_no_grid(source: Path, tmp_path: Path, norms: bool) -> None:
    moved = load_file(make_off_grid(source, tmp_path / "moved", norms=norms) / "model.safetensors")
    before = load_file(source / "model.safetensors")
    names = ["self_attn.o_proj", "block_sparse_moe.output_linear", "shared_mlp.output_linear"]
    if norms:
        names += ["self_attn.q_proj", "block_sparse_moe.input_linear"]
    for name in (f"model.layers.1.{each}.weight" for each in names):
        assert distinct(before[name]) < 0.75 and distinct(moved[name]) > 0.9, name


def test_a_channel_of_a_kv_head_is_read_by_its_query_heads() -> None:
    spread = Heads(query=4, kv=2, width=3).per_query_head(torch.arange(6))
    assert spread.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_factors_repeat_with_the_seed_and_stay_in_their_spread() -> None:
    first = drawn(1000, torch.Generator().manual_seed(5))
    assert torch.equal(first, drawn(1000, torch.Generator().manual_seed(5)))
    assert 1 / SPREAD <= float(first.min()) < 0.8 and 1.3 < float(first.max()) <= SPREAD


def test_the_folder_opens_like_the_source_without_its_checksums(
    source: Path, tmp_path: Path
) -> None:
    moved = make_off_grid(source, tmp_path / "moved")
    there = {path.name for path in moved.iterdir()}
    assert there == {path.name for path in source.iterdir()} - {".moestro-files.json"}
    assert json.loads((moved / "config.json").read_text())["num_local_experts"] == EXPERTS
    written = (moved / "model.safetensors").stat().st_mtime_ns
    make_off_grid(source, moved)
    assert (moved / "model.safetensors").stat().st_mtime_ns == written
