"""The plan is arithmetic: every refusal carries its sums."""

from dataclasses import replace

import pytest

from moestro.engine import BudgetTooSmall
from moestro.engine.facts.units import MIB
from moestro.engine.planning.memory import Demand, settle

DEMAND = Demand(
    interpreter_bytes=400 * MIB,
    dense_bytes=300 * MIB,
    workspace_bytes=100 * MIB,
    experts_total_bytes=1000 * MIB,
    experts_least_bytes=50 * MIB,
    kv_bytes_per_token=MIB // 4,
    context_tokens=1024,
)


def test_budgets_are_chosen_where_none_is_given() -> None:
    plan = settle(DEMAND, None, None, (10_000 * MIB, "the machine"))
    assert plan.experts_bytes == DEMAND.experts_total_bytes
    assert plan.kv_tokens == DEMAND.context_tokens
    assert plan.total_bytes == (800 + 1000 + 256) * MIB


def test_on_a_small_machine_experts_take_what_is_left() -> None:
    plan = settle(DEMAND, None, 64 * MIB, (1200 * MIB, "the machine"))
    assert DEMAND.experts_least_bytes < plan.experts_bytes < DEMAND.experts_total_bytes
    assert plan.total_bytes <= 1200 * MIB


def test_a_given_budget_is_taken_as_it_is() -> None:
    plan = settle(DEMAND, 60 * MIB, 17 * MIB, (10_000 * MIB, "the machine"))
    assert (plan.experts_bytes, plan.kv_bytes, plan.kv_tokens) == (60 * MIB, 17 * MIB, 64)
    assert sum(plan.parts().values()) == plan.total_bytes
    text = "\n".join(plan.lines())
    for words in ("60 MiB", "--host-memory", "--kv-memory", "interpreter 400 MiB"):
        assert words in text


def test_a_total_above_the_limit_is_refused_with_what_would_fit() -> None:
    with pytest.raises(BudgetTooSmall, match=r"needs 1\.8 GiB.*group.*--host-memory 168MiB") as e:
        settle(DEMAND, 1000 * MIB, 32 * MIB, (1000 * MIB, "the memory group's limit"))
    assert "\n" not in str(e.value)
    settle(DEMAND, 168 * MIB, 32 * MIB, (1000 * MIB, "the memory group's limit"))


def test_a_limit_below_the_fixed_part_names_the_least() -> None:
    with pytest.raises(BudgetTooSmall, match="the least that works .* is 882 MiB"):
        settle(DEMAND, None, 32 * MIB, (500 * MIB, "the memory group's limit"))


def test_kv_that_holds_no_token_is_refused() -> None:
    with pytest.raises(BudgetTooSmall, match="the least is 64 tokens of 256 KiB, 16 MiB"):
        settle(DEMAND, None, 1000, (10_000 * MIB, "the machine"))


def test_where_nothing_fits_the_refusal_says_so_and_blames_no_flag() -> None:
    words = r"at least 866 MiB \(fixed 800 MiB \+ experts of one token 50 MiB \+ kv of 64 tokens"
    with pytest.raises(BudgetTooSmall, match=words) as caught:
        settle(DEMAND, None, None, (500 * MIB, "the machine's memory"))
    assert "--kv-memory" not in str(caught.value)


def test_what_just_fits_is_planned() -> None:
    """The reserve is a wish; the smallest KV and experts come first."""
    plan = settle(DEMAND, None, None, (866 * MIB, "the machine"))
    assert (plan.experts_bytes, plan.kv_tokens) == (50 * MIB, 64)


def test_room_beyond_all_experts_is_not_planned() -> None:
    plan = settle(DEMAND, 50_000 * MIB, 32 * MIB, (10_000 * MIB, "the machine"))
    assert plan.experts_bytes == DEMAND.experts_total_bytes
    assert plan.total_bytes == (800 + 1000 + 32) * MIB


def test_packing_counts_where_it_takes_more_than_serving() -> None:
    small = replace(DEMAND, packing_bytes=300 * MIB)
    plan = settle(small, 60 * MIB, 17 * MIB, (10_000 * MIB, "the machine"))
    assert plan.packing_excess_bytes == 0
    large = replace(DEMAND, packing_bytes=900 * MIB)
    plan = settle(large, 60 * MIB, 17 * MIB, (10_000 * MIB, "the machine"))
    assert plan.total_bytes == (400 + 900) * MIB == sum(plan.parts().values())
    assert "packing" in plan.lines()[-1] and "900 MiB" in plan.lines()[-1]
    with pytest.raises(BudgetTooSmall, match="packing"):
        settle(large, 60 * MIB, 17 * MIB, (1200 * MIB, "the machine"))


def test_budgets_that_are_chosen_take_what_is_available_less_the_reserve() -> None:
    limit = (10_000 * MIB, "the machine")
    plan = settle(DEMAND, None, 64 * MIB, limit, available_bytes=2600 * MIB)
    assert plan.experts_bytes == (2600 - 1500 - 800 - 64) * MIB
    whole = settle(DEMAND, None, 64 * MIB, limit)
    assert whole.experts_bytes == DEMAND.experts_total_bytes
    # What is given is the user's, and what is needed is tried: others may let go of theirs.
    given = settle(DEMAND, 900 * MIB, 64 * MIB, limit, available_bytes=1000 * MIB)
    assert given.experts_bytes == 900 * MIB
    least = settle(DEMAND, None, 64 * MIB, limit, available_bytes=1000 * MIB)
    assert least.experts_bytes == DEMAND.experts_least_bytes


def test_files_that_are_memory_are_a_part_of_the_plan() -> None:
    there = replace(DEMAND, files_bytes=338 * MIB)
    plan = settle(there, 60 * MIB, 17 * MIB, (10_000 * MIB, "the machine"))
    assert plan.parts()["files"] == 338 * MIB
    assert sum(plan.parts().values()) == plan.total_bytes == (800 + 338 + 60 + 17) * MIB
    assert any("files" in line and "338 MiB" in line for line in plan.lines())
    with pytest.raises(BudgetTooSmall, match=r"fixed 1\.2 GiB"):
        settle(there, 60 * MIB, 17 * MIB, (1000 * MIB, "the memory group's limit"))
