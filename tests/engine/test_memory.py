"""The plan is arithmetic: every refusal carries its sums."""

import pytest

from moestro.engine import BudgetTooSmall
from moestro.engine.memory import MIB, Demand, memory_limit, settle

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


def test_the_limit_is_found() -> None:
    limit, name = memory_limit()
    assert limit > 100 * MIB and name
