"""Routers from the file beside a checkpoint: the engine's logits are those of plain torch."""

from pathlib import Path

import pytest
import torch

from engine_kit import generate, opened, run_logits
from moestro.engine import EngineConfig, SamplingParams, plan_model
from tiny_routed import EXPERTS, KINDS, LAYERS, TOP_K, build_routed, plain_reference

EXPERT_BYTES = 4096
PROMPT, TOKENS = list(range(10, 40)), [7, 8, 9]
CHUNKS = [[(1, PROMPT[:10])], [(1, PROMPT[10:])], *([(1, [token])] for token in TOKENS)]
ENDS = [9, 29, 30, 31, 32]


def reference(folder: Path, kind: str, tau: float = 1.0, k: int = TOP_K) -> torch.Tensor:
    model = plain_reference(folder, kind, tau, k)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([PROMPT + TOKENS])).logits[0, ENDS]
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_plain_torch(kind: str, tmp_path: Path) -> None:
    """A prompt in chunks, tokens after it, with all experts in memory and with half of them."""
    folder = build_routed(tmp_path, kind)
    wanted = reference(folder, kind)
    found = []
    for share in (1.0, 0.5):
        budget = {"host_memory_bytes": int(share * LAYERS * EXPERTS) * EXPERT_BYTES}
        with opened(folder, tmp_path / "cache", **budget) as loaded:
            found.append(run_logits(loaded, CHUNKS))
            assert (loaded.cache.plan.slots < LAYERS * EXPERTS) == (share < 1)
    assert torch.equal(*found)
    assert (found[0] - wanted).abs().max() < 1e-4


def test_another_number_of_experts_keeps_the_scale(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu")
    with opened(folder, tmp_path / "cache", experts_per_token=5) as loaded:
        found = run_logits(loaded, CHUNKS)
    assert (found - reference(folder, "relu", k=5)).abs().max() < 1e-4


def test_company_changes_no_bit(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "tanh-bias")
    budget = {"host_memory_bytes": 12 * EXPERT_BYTES}
    with opened(folder, tmp_path / "cache", **budget) as loaded:
        alone = run_logits(loaded, [[(1, PROMPT)], [(1, [7])]])
        steps = [[(2, [60, 61]), (1, PROMPT), (3, [9] * 40)], [(3, [4]), (2, [5]), (1, [7])]]
        company = run_logits(loaded, steps)
        assert loaded.prefetch is not None
        guessed = sum(layer.guessed for layer in loaded.prefetch.stats().layers)
    assert torch.equal(company[[1, 5]], alone)
    assert guessed > 0


def test_a_sequence_keeps_experts_of_its_own(tmp_path: Path) -> None:
    """All that it keeps run, whatever the router says; the prompt is the router's alone."""
    folder = build_routed(tmp_path, "relu")
    answers = {}
    for density in (0.25, 1.0):
        params = SamplingParams(
            max_tokens=6, temperature=0.0, ignore_eos=True, expert_density=density
        )
        with opened(folder, tmp_path / "cache") as loaded:
            (answers[density],) = generate(loaded.engine, [PROMPT], params)
            stats = loaded.stats().selection
        assert stats.requests["sequence"] == 1
    with torch.inference_mode():
        first = int(plain_reference(folder, "relu")(torch.tensor([PROMPT])).logits[0, -1].argmax())
    assert [answer.ids[0] for answer in answers.values()] == [first, first]
    assert answers[0.25].ids != answers[1.0].ids


def test_a_plan_foretells_it(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu")
    forecast = plan_model(EngineConfig(folder, tmp_path / "cache", threads=1), disk_bytes_per_s=1e9)
    assert forecast.family == "granitemoeshared"
    assert [layer.experts_per_token for layer in forecast.work.layers] == [TOP_K] * LAYERS
    (folder / "model.safetensors").unlink()
    sketch = plan_model(EngineConfig(folder, tmp_path / "cache", threads=1), disk_bytes_per_s=1e9)
    assert not sketch.has_weights and sketch.work.dense_numbers == forecast.work.dense_numbers
