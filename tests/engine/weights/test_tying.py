"""A config that ties the head to the embedding, and files that hold both: as stock has it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from engine_kit import opened, run_logits
from moestro.engine import ModelRefused
from moestro.engine.model.meta_model import build_meta_model
from moestro.engine.weights import Checkpoint
from moestro.engine.weights.tying import same_numbers

PROMPT = list(range(20, 40))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Slice:
    """What safetensors hands out before anything is read: bounded, and read in parts."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        assert 0 <= rows.start < rows.stop <= len(self._tensor)
        return self._tensor[rows]


def with_head(folder: Path, files: str) -> Path:
    """A tied model in bf16 whose files hold the head as well, or only the head.

    All its experts are active: a rounding that turns a router's choice is no error.
    """
    path = tiny.build("granitemoeshared", folder, torch.bfloat16) / "model.safetensors"
    tensors = load_file(path)
    head = tensors[EMBEDDING].clone()
    tensors[HEAD] = -head.flip(0).contiguous() if files == "other numbers" else head
    if files == "only the head":
        del tensors[EMBEDDING]
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_experts_per_tok"] = config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("files", "dense_format", "most"),
    [
        ("same numbers", "int8", 0.1),
        ("other numbers", "int8", 0.1),
        ("other numbers", "native", 1e-5),
        ("only the head", "int8", 0.1),
    ],
)
def test_logits_are_those_of_stock_transformers(
    files: str,
    dense_format: str,
    most: float,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = with_head(tmp_path / "model", files)
    with torch.inference_mode():
        wanted = tiny.oracle(folder)(torch.tensor([PROMPT])).logits[0, -1]
    caplog.clear()
    for _ in ("made", "as kept"):
        with opened(folder, tmp_path / "cache", dense_format=dense_format) as loaded:
            found = run_logits(loaded, [[(1, PROMPT)]])[0]
            assert (found - wanted).norm() < most * wanted.norm()
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == (2 if files == "other numbers" else 0), "one for each start"
    assert all("tie_word_embeddings should be false" in line for line in said)


def test_equal_weights_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows: a head in tiles has bytes of its own, together no more than one in fp32."""
    monkeypatch.setattr("moestro.engine.formats.named.library", lambda: None)
    folder = with_head(tmp_path / "model", "same numbers")
    with opened(folder, tmp_path / "cache") as loaded:
        model = loaded.engine.runner.lane.model
        assert model.get_parameter(HEAD) is model.get_parameter(EMBEDDING)
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        assert loaded.plan.demand.dense_bytes == held


@pytest.mark.parametrize("says", [True, False])
def test_files_without_a_head_need_a_config_that_ties_it(says: bool, tmp_path: Path) -> None:
    folder = tiny.build("granitemoeshared", tmp_path / "model")
    assert HEAD not in load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": says}))
    checkpoint = Checkpoint(folder)
    model = build_meta_model(checkpoint, torch.float32)
    if says:
        checkpoint.split_keys(model)
        assert model.get_parameter(HEAD) is model.get_parameter(EMBEDDING)
    else:
        with pytest.raises(ModelRefused, match=f"missing in the files: {HEAD}$"):
            checkpoint.split_keys(model)


def test_numbers_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moestro.engine.weights.tying._NUMBERS_AT_ONCE", 8)
    one = torch.arange(28.0).reshape(7, 4)
    other = one.clone()
    other[6, 3] += 1
    assert same_numbers(Slice(one), Slice(one.clone()))
    assert same_numbers(Slice(one), Slice(one.bfloat16())), "the same numbers in another dtype"
    assert not same_numbers(Slice(one), Slice(other))
    assert not same_numbers(Slice(one), Slice(one[:5]))
