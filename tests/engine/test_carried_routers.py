"""Routers from the file beside a checkpoint: the engine's logits are those of plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import generate, opened, run_logits
from moestro.engine import EngineConfig, SamplingParams, StartError, plan_model
from moestro.engine.planning import inspect
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


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_company_changes_no_bit(tau: float, tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "tanh-bias", tau=tau)
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


def test_tau_one_is_the_fixed_number_to_the_bit(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu", tau=0.3)
    fixed = build_routed(tmp_path / "fixed", "relu")
    found = []
    for each, tau in ((folder, 1.0), (fixed, None)):
        with opened(each, tmp_path / "cache", experts_tau=tau) as loaded:
            found.append(run_logits(loaded, CHUNKS))
    assert torch.equal(*found)


@pytest.mark.parametrize("tau", [0.0, 1e-9])
def test_a_tiny_tau_is_the_largest_expert_alone(tau: float, tmp_path: Path) -> None:
    """As one expert per token, which weighs the same."""
    folder = build_routed(tmp_path, "bias", tau=0.3)
    found = []
    for settings in ({"experts_tau": tau}, {"experts_per_token": 1}):
        with opened(folder, tmp_path / "cache", **settings) as loaded:
            before = loaded.cache.stats().lookups
            found.append(run_logits(loaded, [[(1, [5])], [(1, [6])]]))
            assert loaded.cache.stats().lookups - before == 2 * LAYERS
    assert (found[0] - found[1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["linear", "relu-bias"])
def test_only_experts_above_the_threshold_run_and_count(kind: str, tmp_path: Path) -> None:
    folder = build_routed(tmp_path, kind, tau=0.6)
    model = plain_reference(folder, kind, tau=0.6)
    ran: list[int] = []
    for layer in model.model.layers:
        router = layer.block_sparse_moe.router
        router.forward = counted(router.forward, ran)
    with torch.inference_mode():
        model(torch.tensor([[5, 6, 9, 11]]))
    budget = {"host_memory_bytes": 8 * EXPERT_BYTES}
    with opened(folder, tmp_path / "cache", **budget) as loaded:
        before = loaded.cache.stats()
        run_logits(loaded, [[(1, [token])] for token in (5, 6, 9, 11)])
        stats = loaded.cache.stats()
        found = run_logits(loaded, CHUNKS)
    assert stats.lookups - before.lookups == sum(ran)
    assert 4 * LAYERS < sum(ran) < 4 * LAYERS * TOP_K
    assert (found - reference(folder, kind, tau=0.6)).abs().max() < 1e-4


def counted(forward: Any, ran: list[int]) -> Any:
    """Notes how many experts run."""

    def counting(x: torch.Tensor) -> Any:
        found = forward(x)
        ran.append(int((found[1] > 0).sum()))
        return found

    return counting


def test_tau_needs_routers_of_norms(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu", router="moefication")
    for model in (folder, tiny.build("mixtral", tmp_path / "mixtral")):
        with pytest.raises(StartError, match="--experts-tau: .* --router norm --tau T"):
            inspect(EngineConfig(model, tmp_path / "cache", experts_tau=0.5))


def test_a_plan_foretells_it(tmp_path: Path) -> None:
    folder = build_routed(tmp_path, "relu")
    forecast = plan_model(EngineConfig(folder, tmp_path / "cache", threads=1), disk_bytes_per_s=1e9)
    assert forecast.family == "granitemoeshared"
    assert [layer.experts_per_token for layer in forecast.work.layers] == [TOP_K] * LAYERS
    (folder / "model.safetensors").unlink()
    sketch = plan_model(EngineConfig(folder, tmp_path / "cache", threads=1), disk_bytes_per_s=1e9)
    assert not sketch.has_weights and sketch.work.dense_numbers == forecast.work.dense_numbers
