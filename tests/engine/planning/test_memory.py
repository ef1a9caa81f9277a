"""The plan is arithmetic: every refusal carries its sums."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from moestro.engine import BudgetTooSmall
from moestro.engine.facts.units import MIB
from moestro.engine.planning.memory import Demand, memory_limit, settle

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


def groups(root: Path, own: str, limits: dict[str, object]) -> Path:
    """A machine's proc and sys with the process in the groups `own`."""
    for name, text in {"proc/self/cgroup": own, **limits}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("own", "limits", "wanted", "place"),
    [
        ("0::/", {f"{V2}/memory.max": 7 * MIB}, 7 * MIB, "cgroup/memory.max"),
        ("0::/a/b", {f"{V2}/a/b/memory.max": 5 * MIB}, 5 * MIB, "a/b/memory.max"),
        (
            "0::/a/b",
            {f"{V2}/a/b/memory.max": "max", f"{V2}/a/memory.max": 6 * MIB},
            6 * MIB,
            "a/memory.max",
        ),
        (
            "12:pids:/x\n4:memory:/a/b\n0::/",
            {
                f"{V1}/memory.limit_in_bytes": 1 << 62,
                f"{V1}/a/memory.limit_in_bytes": 8 * MIB,
                f"{V1}/a/b/memory.limit_in_bytes": 9 * MIB,
            },
            8 * MIB,
            "a/memory.limit_in_bytes",
        ),
        # The host's path, seen from inside a container.
        ("0::/docker/c1", {f"{V2}/memory.max": 4 * MIB}, 4 * MIB, "cgroup/memory.max"),
        ("0::/../outside", {f"{V2}/memory.max": 4 * MIB}, 4 * MIB, "cgroup/memory.max"),
        ("0::/a", {f"{V2}/unified/a/memory.max": 3 * MIB}, 3 * MIB, "unified/a/memory.max"),
    ],
)
def test_the_tightest_group_on_the_way_up_counts(
    own: str, limits: dict[str, object], wanted: int, place: str, tmp_path: Path
) -> None:
    limit, name = memory_limit(groups(tmp_path, own, limits))
    assert limit == wanted
    assert name.endswith(place)


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    (tmp_path / V2).mkdir(parents=True)
    limit, name = memory_limit(tmp_path)
    assert (limit, name) == (psutil.virtual_memory().total, "the machine's memory")
    (tmp_path / V2 / "memory.max").write_text("1048576")
    assert memory_limit(tmp_path)[0] == MIB


def test_the_limit_is_found() -> None:
    limit, name = memory_limit()
    assert limit > 100 * MIB and name


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
