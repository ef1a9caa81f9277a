"""What every carried family promises: observed, split and applied, it is the dense model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_kit import opened, run_logits
from moestro.engine import Progress
from moestro.factorize import (
    FactorizeError,
    Inputs,
    Outputs,
    Plan,
    RecoverOptions,
    SplitOptions,
    apply_plan,
    make_plan,
    run_dry,
    run_factorize,
)
from moestro.factorize.evaluate import load_model
from moestro.factorize.methods.collect import layer_samples
from moestro.factorize.sources import DenseModel
from tiny_dense import CASES, REPEATED, write_tiny_dense

OPTIONS = SplitOptions(
    experts=4, shared_neurons=16, top_k=3, calibration_tokens=256, window_tokens=64
)

EACH = [pytest.param(case, marks=pytest.mark.slow) if case in REPEATED else case for case in CASES]


def quiet(_: Progress) -> None:
    pass


def stock(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def prompt(tokens: int = 24) -> torch.Tensor:
    return torch.randint(3, 250, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=EACH)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[Path]
) -> tuple[Path, Path, Plan]:
    """The dense model, its twin, and the plan."""
    folder = tmp_path_factory.mktemp("family")
    dense = write_tiny_dense(folder / "dense", request.param)
    plan = make_plan(dense, OPTIONS, texts, quiet)
    apply_plan(plan, dense, folder / "twin", quiet)
    return dense, folder / "twin", plan


def test_all_experts_together_are_the_dense_model(pair: tuple[Path, Path, Plan]) -> None:
    dense, whole = stock(pair[0]), load_model(pair[1], experts_per_token=4)
    with torch.inference_mode():
        expected = dense(prompt()).logits
        assert expected.std() > 0.1
        assert (expected - whole(prompt()).logits).abs().max() < 1e-4
        greedy = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
        first, second = (model.generate(prompt()[:1], **greedy) for model in (dense, whole))
    assert torch.equal(first, second)


def test_calibration_sees_what_the_stock_model_sees(pair: tuple[Path, Path, Plan]) -> None:
    windows = prompt()
    samples = list(layer_samples(DenseModel.open(pair[0]), windows))
    model, seen = stock(pair[0]), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        model(windows)
    for sample, inputs in zip(samples, seen, strict=True):
        assert torch.allclose(sample.inputs, inputs.flatten(0, 1), atol=1e-4)


@pytest.mark.slow
def test_the_engine_serves_the_twin(pair: tuple[Path, Path, Plan], tmp_path: Path) -> None:
    ids = prompt()[0].tolist()
    steps = [[(1, ids[:14])], *([(1, [token])] for token in ids[14:])]
    with torch.inference_mode():
        wanted = stock(pair[1])(torch.tensor([ids])).logits[0, 13:]
    with opened(pair[1], tmp_path) as loaded:
        plan = loaded.cache.plan
    half = plan.total_experts // 2 * plan.slot_bytes
    with opened(pair[1], tmp_path, host_memory_bytes=half) as loaded:
        assert not loaded.cache.plan.holds_all
        assert (run_logits(loaded, steps) - wanted).abs().max() < 1e-4
        assert loaded.cache.stats().misses > 0


@pytest.mark.parametrize("case", ["phi3", "olmo"])
def test_what_is_stored_otherwise_is_not_recovered(
    case: str, texts: list[Path], tmp_path: Path
) -> None:
    dense, out = write_tiny_dense(tmp_path / "dense", case), tmp_path / "out"
    inputs, recovery = Inputs(calibration=tuple(texts)), RecoverOptions(steps=1)
    with pytest.raises(FactorizeError, match="not recovered.*leave out --recover"):
        run_factorize(str(dense), out, OPTIONS, inputs, Outputs(), quiet, recovery)
    with pytest.raises(FactorizeError, match="not recovered"):
        run_dry(str(dense), out, OPTIONS, inputs, recovery)
