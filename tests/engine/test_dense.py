"""The dense part as int8: fewer bytes, nearly the same logits, routers untouched."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from moestro.engine.dense import Int8Linear

PROMPT = list(range(20, 40))


def logits(folder: Path, cache: Path, **formats: Any) -> torch.Tensor:
    with opened(folder, cache, **formats) as loaded:
        return run_logits(loaded, [[(1, PROMPT)], [(1, [7])]])


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "olmoe", "gpt_oss"])
def test_int8_logits_are_near_the_native_ones(family: str, tmp_path: Path) -> None:
    """With all experts active: a rounding that turns a random router's choice is no error."""
    folder = tiny.build(family, tmp_path / family)
    native = logits(folder, tmp_path / "cache", experts_per_token=8)
    for formats in (
        {"expert_format": "int8"},
        {"dense_format": "int8"},
        {"expert_format": "int8", "dense_format": "int8"},
    ):
        found = logits(folder, tmp_path / "cache", experts_per_token=8, **formats)
        error = (found - native).norm() / native.norm()
        assert 0 < error < 0.2, (formats, float(error))


def test_every_linear_layer_but_the_routers_becomes_int8(tmp_path: Path) -> None:
    folder = tiny.build("granitemoeshared", tmp_path / "model")  # its head is tied
    with opened(folder, tmp_path / "cache", dense_format="int8") as loaded:
        model = loaded.engine.runner._model
        kinds = {path: type(module) for path, module in model.named_modules()}
        assert torch.nn.Linear not in kinds.values()
        assert kinds["lm_head"] is Int8Linear
        assert kinds["model.layers.0.self_attn.q_proj"] is Int8Linear
        router = model.get_submodule("model.layers.0.block_sparse_moe.router")
        assert router.weight.dtype == torch.float32
        assert not list(model.get_submodule("lm_head").parameters())


def test_the_plan_counts_the_smaller_weights(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    dense = {}
    for name in ("native", "int8"):
        with opened(folder, tmp_path / "cache", dense_format=name) as loaded:
            dense[name] = loaded.plan.demand.dense_bytes
            model = loaded.engine.runner._model
            held = sum(p.numel() * 4 for p in model.parameters())
            held += sum(
                module.values.numel() + 4 * module.scale.numel()
                for module in model.modules()
                if isinstance(module, Int8Linear)
            )
            assert held == dense[name]
    assert dense["int8"] < 0.6 * dense["native"]


@pytest.mark.parametrize("slots", [32, 5, 2])
def test_int8_logits_do_not_depend_on_the_budget_either(slots: int, tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    formats = {"expert_format": "int8", "dense_format": "int8"}
    wanted = logits(folder, tmp_path / "cache", **formats)
    with opened(folder, tmp_path / "cache", host_memory_bytes=slots * 16384, **formats) as loaded:
        assert loaded.cache.plan.slots == slots
        assert torch.equal(run_logits(loaded, [[(1, PROMPT)], [(1, [7])]]), wanted)
