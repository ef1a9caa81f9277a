"""The host's tier beside a GPU: pinned, so bound by what others have left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from moestro.engine import BudgetTooSmall, EngineConfig, StartError
from moestro.engine.facts import planned_card
from moestro.engine.planning import inspect, plan_memory
from moestro.engine.planning.device_memory import (
    HOST_ALLOWANCE_BYTES,
    PINNED_RESERVE_BYTES,
    HostDemand,
    HostPlan,
    settle_host,
)

GIB = 1 << 30
STAGING = 32 << 20


def settled(
    limit_gib: int, available_gib: float, given_gib: int | None = None, *, pinned: bool = True
) -> HostPlan:
    """For 54 GiB of experts, with a GiB resident."""
    demand = HostDemand(
        interpreter_bytes=GIB,
        experts_total_bytes=54 * GIB,
        experts_least_bytes=GIB + STAGING,
        experts_wish_bytes=54 * GIB + STAGING,
        staging_bytes=STAGING,
        packing_bytes=2 * GIB,
        pinned=pinned,
    )
    given = None if given_gib is None else given_gib * GIB
    limit = (limit_gib * GIB, "the machine's memory")
    return settle_host(demand, given, limit, int(available_gib * GIB))


@pytest.mark.parametrize(
    ("limit_gib", "available_gib"), [(32, 32), (32, 20), (8, 8), (8, 5), (64, 60)]
)
def test_what_is_chosen_leaves_others_their_memory(limit_gib: int, available_gib: int) -> None:
    plan = settled(limit_gib, available_gib)
    left = available_gib * GIB - plan.total_bytes
    assert left >= max(PINNED_RESERVE_BYTES, int(0.15 * limit_gib * GIB))
    assert plan.experts_bytes > plan.demand.experts_least_bytes and plan.warning is None
    assert any("pinned, " in line and "--host-memory" in line for line in plan.lines())


def test_what_is_given_may_take_more_than_is_available_and_is_warned_of() -> None:
    plan = settled(32, 10, 20)
    assert plan.experts_bytes == 20 * GIB
    assert plan.warning is not None and "10 GiB are available" in plan.warning
    assert settled(32, 30, 20).warning is None
    with pytest.raises(BudgetTooSmall, match="--host-memory"):
        settled(32, 30, 31)


def test_the_least_is_taken_though_it_is_not_available() -> None:
    plan = settled(32, 2)
    assert plan.experts_bytes == plan.demand.experts_least_bytes
    assert plan.warning is not None


def test_what_can_be_swapped_leaves_a_share_alone() -> None:
    plan = settled(8, 8, pinned=False)
    fixed = GIB + HOST_ALLOWANCE_BYTES
    assert plan.experts_bytes == 8 * GIB - int(0.15 * 8 * GIB) - fixed
    assert not any("pinned" in line for line in plan.lines())


def test_dense_int8_of_odd_shapes_is_refused_on_a_gpu(tmp_path: Path) -> None:
    """260 ids are no multiple of 8; before anything is loaded."""
    folder = tiny.build("mixtral", tmp_path / "model")
    config = EngineConfig(folder, tmp_path, dense_format="int8", kv_memory_bytes=1 << 20)
    with pytest.raises(StartError, match=r"--dense-format int8: lm_head is 260 x 64"):
        plan_memory(config, inspect(config, planned_card(8 * GIB)))


def test_a_gpu_s_workspace_has_no_room_for_what_is_not_done_there(tmp_path: Path) -> None:
    """Matrices widened, masks and repeated heads of plain causality: none of them."""
    folder = tiny.build("mixtral", tmp_path / "model", torch.bfloat16)

    def workspace(context: int, **card: Any) -> int:
        config = EngineConfig(
            folder,
            tmp_path,
            kv_memory_bytes=1 << 22,
            max_step_tokens=64,
            max_model_len_tokens=context,
        )
        device = replace(planned_card(8 * GIB), **card)
        return plan_memory(config, inspect(config, device)).demand.workspace_bytes

    assert workspace(512) == workspace(128)
    heads, width, longer = 4, 16, 512 - 128
    turing = {"grouped_heads": False, "compute_dtype": torch.float16}
    assert workspace(512, **turing) - workspace(128, **turing) == 2 * 2 * heads * width * longer
