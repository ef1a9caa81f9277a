"""What is proposed works: every change and every nearest plan is itself a plan that fits."""

from dataclasses import replace
from pathlib import Path

import pytest

from moestro.engine import BudgetTooSmall, EngineConfig
from moestro.engine.facts import Lane, LaneChoice
from moestro.engine.facts.units import MIB
from moestro.engine.forecasts.advice import changes, flags_of, nearest_plan, size_flag
from moestro.engine.forecasts.forecast import ComputeSpeed, Forecast, LinkSpeed, MoeLayer, Work
from moestro.engine.planning.memory import Demand, MemoryPlan, settle

DEMAND = Demand(
    interpreter_bytes=400 * MIB,
    dense_bytes=300 * MIB,
    workspace_bytes=100 * MIB,
    experts_total_bytes=1000 * MIB,
    experts_least_bytes=50 * MIB,
    kv_bytes_per_token=MIB // 4,
    context_tokens=1024,
)
LAYER = MoeLayer(num_experts=20, experts_per_token=2, blob_bytes=5 * MIB, numbers=1_000_000)
WORK = Work((LAYER,) * 10, dense_numbers=1_000_000, head_numbers=100_000, chunk_tokens=512)


def settled(config: EngineConfig, limit_bytes: int = 2000 * MIB) -> MemoryPlan:
    """The start's rules in short."""
    host = config.host_memory_bytes
    if host is not None and host < DEMAND.experts_least_bytes:
        raise BudgetTooSmall("--host-memory")
    if (config.max_model_len_tokens or 0) > DEMAND.context_tokens:
        raise BudgetTooSmall("--max-model-len")
    plan = settle(DEMAND, host, config.kv_memory_bytes, (limit_bytes, "the machine"))
    if plan.kv_tokens < (config.max_model_len_tokens or 0):
        raise BudgetTooSmall("--max-model-len")
    return plan


def config(host: int | None, kv: int | None, context: int | None) -> EngineConfig:
    return EngineConfig(
        Path("model"),
        Path("cache"),
        host_memory_bytes=host,
        kv_memory_bytes=kv,
        max_model_len_tokens=context,
    )


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ((10 * MIB, None, None), "--host-memory 50MiB"),
        ((9000 * MIB, None, None), "--host-memory 644MiB"),
        ((60 * MIB, 1000, None), "--host-memory 60MiB --kv-memory 256MiB"),
        ((60 * MIB, None, 5000), "--host-memory 60MiB --max-model-len 1024"),
        ((60 * MIB, MIB, 900), "--host-memory 60MiB --kv-memory 256MiB --max-model-len 900"),
        ((None, 5000 * MIB, None), "--kv-memory 256MiB"),
    ],
)
def test_the_nearest_plan_changes_as_little_as_it_can(given, flags: str) -> None:
    wrong = config(*given)
    with pytest.raises(BudgetTooSmall):
        settled(wrong)
    near = nearest_plan(wrong, settled)
    assert near is not None
    assert flags_of(near) == flags
    settled(near)


def test_where_nothing_fits_nothing_is_proposed() -> None:
    wrong = config(60 * MIB, MIB, None)
    assert nearest_plan(wrong, lambda one: settled(one, 500 * MIB)) is None


def test_sizes_as_flags_are_exact() -> None:
    assert [size_flag(n) for n in (4 << 30, 54 * MIB, 108 * 1024, 1000)] == [
        "4GiB",
        "54MiB",
        "108KiB",
        "1000",
    ]


def forecast(slots: int, limit_bytes: int = 4000 * MIB, factorized: bool = False) -> Forecast:
    plan = settle(DEMAND, slots * 5 * MIB, 64 * MIB, (limit_bytes, "the machine"))
    return Forecast(
        lane=LaneChoice(Lane.PACKED),
        family="tiny",
        stored_dtype="bfloat16",
        expert_format="native",
        dense_format="native",
        has_weights=True,
        factorized=factorized,
        plan=plan,
        slots=slots,
        slot_bytes=5 * MIB,
        work=WORK,
        link=LinkSpeed(100 * MIB, 100 * MIB, "given"),
        compute=ComputeSpeed(1e9, 1e9, 1e9, 1e9, 1, "plain"),
        gains=None,
    )


def test_what_would_change_a_plan() -> None:
    flags = [one.flags for one in changes(forecast(15, factorized=True))]
    assert flags == [
        "--host-memory 1000MiB",
        "--experts-per-token 1",
        "--kv-memory 256MiB",
    ]
    assert [one.flags for one in changes(forecast(100))] == [
        "--host-memory 1000MiB",
        "--kv-memory 256MiB",
    ]
    assert [one.flags for one in changes(forecast(200))] == ["--kv-memory 256MiB"]


def test_half_of_the_experts_is_half_of_what_layers_take_on_average() -> None:
    """Where some layers take all of theirs, too: the flag changes all in proportion."""
    counts = (20, 2, 4, 6) * 5
    layers = tuple(replace(LAYER, experts_per_token=count) for count in counts)
    uneven = replace(
        forecast(15, factorized=True), work=replace(WORK, layers=layers[: len(WORK.layers)])
    )
    assert "--experts-per-token 4" in [one.flags for one in changes(uneven)]


def test_no_flag_is_named_where_the_machine_is_too_small() -> None:
    first = changes(forecast(100, 1500 * MIB))[0]
    assert first.flags == ""
    assert "1000 MiB" in first.effect and "leaves 636 MiB" in first.effect
