"""State changes that are allowed, those that are not, and planted faults that `check` finds."""

from collections.abc import Callable

import pytest

from moestro.cache import ExpertKey, SlotState
from moestro.cache.policy.table import NOWHERE, SlotTable

A, B = ExpertKey(0, 1), ExpertKey(1, 2)


@pytest.fixture
def table() -> SlotTable:
    """Four slots: A is READY, B is LOADING, two are FREE."""
    table = SlotTable(4, [3, 3])
    table.arrived([table.begin(A)])
    table.begin(B)
    table.check()
    return table


def test_a_slot_goes_through_its_states(table: SlotTable) -> None:
    slot = table.where[1][2]
    assert table.state(slot) is SlotState.LOADING
    table.arrived([slot])
    assert table.state(slot) is SlotState.READY
    assert table.evict(slot) == B
    assert table.state(slot) is SlotState.FREE
    assert table.where[1][2] == NOWHERE
    assert (table.free, table.used) == (3, 1)
    table.check()


def test_a_failed_read_frees_its_slot(table: SlotTable) -> None:
    table.pinned.add(table.where[1][2])
    assert table.failed(table.where[1][2]) == B
    assert table.free == 3
    table.check()


def test_slots_pass_from_expert_to_expert(table: SlotTable) -> None:
    slot, after = table.where[0][1], ExpertKey(1, 0)
    table.passing[slot] = None
    table.guessed.add(slot)
    assert table.pass_on([slot], [after]) == [A]
    assert (table.where[0][1], table.where[1][0]) == (NOWHERE, slot)
    assert table.state(slot) is SlotState.LOADING
    assert slot in table.passing and slot not in table.guessed
    table.check()


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda table: table.begin(A),
        lambda table: table.evict(table.where[1][2]),
        lambda table: (table.pinned.add(table.where[0][1]), table.evict(table.where[0][1])),
        lambda table: table.pass_on([table.where[1][2]], [ExpertKey(1, 0)]),
        lambda table: table.pass_on([table.where[0][1]], [B]),
        lambda table: (
            table.pinned.add(table.where[0][1]),
            table.pass_on([table.where[0][1]], [ExpertKey(1, 0)]),
        ),
    ],
    ids=[
        "a second slot",
        "evict LOADING",
        "evict pinned",
        "pass on LOADING",
        "to one here",
        "pinned",
    ],
)
def test_what_must_not_happen_is_refused(
    table: SlotTable, forbidden: Callable[[SlotTable], object]
) -> None:
    with pytest.raises(RuntimeError):
        forbidden(table)
    table.check()


@pytest.mark.parametrize(
    "plant",
    [
        lambda t: t.keys.__setitem__(t.where[0][1], B),
        lambda t: t.where[0].__setitem__(1, t.where[1][2]),
        lambda t: t.where[0].__setitem__(0, 3),
        lambda t: t.where[0].__setitem__(1, NOWHERE),
        lambda t: t._free.append(t.where[0][1]),
        lambda t: t._free.pop(),
        lambda t: t.loading.add(t.where[0][1]),
        lambda t: t.loading.clear(),
        lambda t: t.ready.__setitem__(3, 1),
        lambda t: t.pinned.add(3),
        lambda t: t.guessed.add(3),
    ],
)
def test_planted_faults_are_found(table: SlotTable, plant: Callable[[SlotTable], object]) -> None:
    plant(table)
    with pytest.raises(AssertionError, match="against"):
        table.check()
