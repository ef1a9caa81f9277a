"""A plan is the start's own: same folder, same settings, same numbers; and nothing is written."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import KIB, MIB, opened
from imagined import imagined
from moestro.engine import (
    BudgetTooSmall,
    EngineConfig,
    Forecast,
    HostMemory,
    ModelRefused,
    card_of,
    plan_card,
    plan_model,
)
from moestro.engine.facts.units import GIB
from moestro.engine.planning import inspect, plan_memory


def plan(folder: Path, cache_dir: Path, **settings: Any) -> Forecast:
    settings = {"kv_memory_bytes": 4 * MIB, "threads": 1} | settings
    return plan_model(EngineConfig(folder, cache_dir, **settings), disk_bytes_per_s=1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("olmoe", tmp_path_factory.mktemp("planner") / "model")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host_memory_bytes": 500 * KIB, "max_model_len_tokens": 100},
        {"expert_format": "int8", "dense_format": "int8", "experts_per_token": 4},
    ],
)
def test_it_is_what_the_start_plans(settings: Any, folder: Path, tmp_path: Path) -> None:
    forecast = plan(folder, tmp_path, **settings)
    assert not list(tmp_path.iterdir())
    with opened(folder, tmp_path, **settings) as loaded:
        started = loaded.plan.parts()
        assert forecast.slots == loaded.cache.plan.slots
        assert forecast.slot_bytes == loaded.info.expert_bytes
        assert forecast.context_tokens == loaded.info.max_model_len_tokens
        assert forecast.family == loaded.info.family
    assert {**forecast.plan.parts(), "interpreter": 0} == {**started, "interpreter": 0}


def test_the_work_is_what_a_token_is_multiplied_with(folder: Path, tmp_path: Path) -> None:
    work = plan(folder, tmp_path).work
    assert [layer.num_experts for layer in work.layers] == [8] * 4
    assert {layer.experts_per_token for layer in work.layers} == {2}
    assert {layer.numbers for layer in work.layers} == {3 * 64 * 64}
    assert work.head_numbers == 260 * 64
    attention = 64 * 64 * 2 + 64 * 32 * 2  # q, o; k, v of half as many heads
    norms = 64 + 32 + 2 * 64
    assert work.dense_numbers == 4 * (attention + norms + 8 * 64) + 64


def test_a_config_alone_is_planned(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    here, absent = plan(folder, tmp_path), plan(bare, tmp_path)
    assert (here.has_weights, absent.has_weights) == (True, False)
    assert (absent.slots, absent.work) == (here.slots, here.work)


def test_a_contradiction_comes_with_the_nearest_plan(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetTooSmall, match=r"the nearest plan .*--host-memory 96KiB") as caught:
        plan(folder, tmp_path, host_memory_bytes=50 * KIB)
    assert "\n" not in str(caught.value)
    assert plan(folder, tmp_path, host_memory_bytes=96 * KIB).slots == 2


def test_a_dense_model_is_refused_without_its_weights_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    with pytest.raises(ModelRefused, match="no experts .* 'llama'"):
        plan(tmp_path, tmp_path)


def test_a_card_s_plan_is_that_of_a_start_on_one(folder: Path, tmp_path: Path) -> None:
    """The GPU of a start, of which nothing is used here, has as much free memory."""
    free_bytes = 2 << 30
    config = EngineConfig(folder, tmp_path, device="cuda", device_memory_bytes=free_bytes + GIB)
    card = card_of(config)
    assert card is not None and card.room is not None and card.room.free_bytes == free_bytes
    found = plan_card(config, card, disk_bytes_per_s=1e9)
    device = imagined(torch.bfloat16, free_bytes, card.staging_bytes)(config)
    device = replace(device, place=card.place)
    started = plan_memory(
        EngineConfig(folder, tmp_path, expert_format="native"), inspect(config, device)
    )
    assert found.plan.experts_bytes == started.experts_bytes
    assert found.plan.kv_bytes == started.kv_bytes
    assert found.plan.demand.dense_bytes == started.demand.dense_bytes


def test_another_machine_s_memory_can_be_planned_with(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig(folder, tmp_path, device="auto", device_memory_bytes=2 << 30)
    card = card_of(config)
    assert card is not None
    machine = HostMemory((3 << 30, "a small machine"))
    found = plan_card(config, card, disk_bytes_per_s=1e9, machine=machine)
    assert found.plan.host is not None
    assert (found.plan.host.limit_bytes, found.plan.host.limit_name) == machine.limit
