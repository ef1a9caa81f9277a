"""Tensors that a text pass of the class has no use for: counted nowhere, read never, named once."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_families
from engine_kit import opened, run_logits
from moestro.engine import EngineConfig
from moestro.engine.planning import inspect, plan_memory


def with_next_token_layer(folder: Path, name: str) -> Path:
    """A copy with another layer behind the last one, as releases with a draft head have it."""
    other = shutil.copytree(folder, folder.with_name(name))
    path = other / "model.safetensors"
    tensors = load_file(path)
    last = {key: each for key, each in tensors.items() if key.startswith("model.layers.3.")}
    more = {key.replace("layers.3.", "layers.4."): each.clone() for key, each in last.items()}
    more["model.layers.4.eh_proj.weight"] = torch.ones(64, 128)
    save_file(tensors | more, path, {"format": "pt"})
    return other


def test_a_next_token_layer_changes_nothing_but_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny.build("deepseek_v3", tmp_path / "plain")
    more = with_next_token_layer(plain, "more")
    plans = [
        plan_memory(config, inspect(config))
        for config in (EngineConfig(folder, tmp_path / "cache") for folder in (plain, more))
    ]
    assert plans[0].demand.dense_bytes == plans[1].demand.dense_bytes
    assert plans[0].demand.experts_total_bytes == plans[1].demand.experts_total_bytes
    caplog.clear()
    steps = [[(1, list(range(10, 20)))], [(1, [7])]]
    with caplog.at_level(logging.INFO), opened(more, tmp_path / "cache") as loaded:
        found = run_logits(loaded, steps)
    named = [line for line in caplog.messages if line.startswith("not read:")]
    assert len(named) == 1
    assert "KiB" in named[0] and "model.layers.4." in named[0]
    with opened(plain, tmp_path / "cache") as loaded:
        assert torch.equal(run_logits(loaded, steps), found)


def test_an_image_tower_gets_no_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_families.build("qwen3_vl_moe", tmp_path / "model")
    with caplog.at_level(logging.INFO), opened(folder, tmp_path / "cache") as loaded:
        tower = loaded.engine.runner.lane.model.get_submodule("model.visual")
        assert not list(tower.parameters())
    (named,) = [line for line in caplog.messages if line.startswith("not read:")]
    assert "visual" in named
