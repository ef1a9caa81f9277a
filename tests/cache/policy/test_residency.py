"""Which experts get slots, only pass, or are evicted: what live cache and replay decide alike."""

from collections.abc import Sequence

import pytest

from moestro.cache import ExpertKey, Lru, NextUse, Phase, Routed
from moestro.cache.policy.counters import Counters
from moestro.cache.policy.residency import Residency, missing
from moestro.cache.policy.table import SlotTable

EXPERTS = [8, 8, 8]
DECODE, PREFILL = Phase.DECODE, Phase.PREFILL


def residency(slots: int) -> Residency:
    return Residency(SlotTable(slots, EXPERTS), Lru(), Counters(len(EXPERTS)), EXPERTS)


def assigned(
    found: Residency, layer: int, experts: Sequence[int], phase: Phase = DECODE
) -> list[int]:
    """One event as far as its slots, all of which are filled; the experts that got one."""
    found.ask(layer, experts, phase)
    wanted = missing(found.table.where[layer], experts)
    slots = found.assign(layer, wanted, experts, phase)
    found.table.arrived(slots)
    found.table.pinned.clear()
    found.table.check()
    return wanted[: len(slots)]


def here(found: Residency, layer: int) -> list[int]:
    return [expert for expert, slot in enumerate(found.table.where[layer]) if slot >= 0]


def passing(found: Residency) -> list[ExpertKey | None]:
    return [found.table.keys[slot] for slot in found.table.passing]


@pytest.mark.parametrize(("slots", "share"), [(1, 1), (2, 2), (3, 2), (16, 2), (24, 3), (151, 18)])
def test_one_slot_in_eight_may_be_passed_through_and_two_at_least(slots: int, share: int) -> None:
    assert residency(slots).stream_slots == share


def test_an_event_streams_if_it_is_of_a_prompt_or_larger_than_the_slots() -> None:
    found = residency(4)
    assert found.streams(0, 1, PREFILL)
    assert found.streams(0, 5, DECODE)
    assert not found.streams(0, 4, DECODE)


def test_decoding_takes_the_slots_it_needs() -> None:
    found = residency(8)
    assigned(found, 0, range(8))
    assert assigned(found, 1, range(6)) == [0, 1, 2, 3, 4, 5]
    assert here(found, 0) == [6, 7]
    assert not found.table.passing


def test_a_prompt_takes_free_slots_like_anyone() -> None:
    found = residency(8)
    assert assigned(found, 0, range(8), PREFILL) == list(range(8))
    assert not found.table.passing


def test_beyond_free_slots_a_prompt_takes_its_share_only() -> None:
    found = residency(8)
    assigned(found, 0, range(6))
    assert assigned(found, 1, range(8), PREFILL) == [
        0,
        1,
        2,
        3,
    ]  # two free, two of eight in passing
    assert passing(found) == [(1, 2), (1, 3)]
    assert here(found, 0) == [2, 3, 4, 5]


def test_who_passed_leaves_before_anyone_else() -> None:
    found = residency(8)
    assigned(found, 0, range(8))
    assert assigned(found, 1, range(8), PREFILL) == [0, 1]
    assert assigned(found, 2, range(8), PREFILL) == [0, 1]
    assert (here(found, 0), here(found, 1)) == ([2, 3, 4, 5, 6, 7], [])
    assigned(found, 1, [5])
    assert passing(found) == [(2, 1)]
    assert here(found, 0) == [2, 3, 4, 5, 6, 7]


def test_what_decoding_asks_for_stays_from_then_on() -> None:
    found = residency(8)
    assigned(found, 0, range(8))
    assigned(found, 1, range(8), PREFILL)
    assigned(found, 1, [0, 1], PREFILL)
    assert passing(found) == [(1, 0), (1, 1)]
    assigned(found, 1, [0])
    assert passing(found) == [(1, 1)]
    assigned(found, 2, range(3), PREFILL)
    assert here(found, 1) == [0]


def sweeping(slots: int) -> Residency:
    """All layers have asked for all their experts."""
    counters, table = Counters(len(EXPERTS)), SlotTable(slots, EXPERTS)
    found = Residency(table, Lru(), counters, EXPERTS, sweeping=True)
    for layer, count in enumerate(EXPERTS):
        found.ask(layer, range(count), DECODE)
    return found


def test_nearly_all_experts_of_a_layer_are_a_sweep_where_not_all_have_slots() -> None:
    found = sweeping(20)
    assert found.sweeps(0, 6, DECODE) and found.sweeps(0, 8, DECODE)
    assert not found.sweeps(0, 5, DECODE) and not found.sweeps(0, 8, PREFILL)
    assert found.will_sweep(1)
    found.ask(1, range(5), DECODE)
    assert not found.sweeps(0, 8, DECODE), "a layer of its own that asks for all is none"
    assert not found.will_sweep(1)
    assert not sweeping(24).sweeps(0, 8, DECODE)
    assert not residency(20).sweeps(0, 8, DECODE)


def test_sweeps_keep_who_is_here_and_the_others_pass() -> None:
    found = sweeping(20)
    for layer in (0, 1):
        assigned(found, layer, range(8))
    assert assigned(found, 2, range(8)) == [0, 1, 2, 3, 4, 5]  # four were free, two may pass
    stay = here(found, 1), here(found, 2)[:4]
    for _ in range(3):
        for layer in range(3):
            assigned(found, layer, range(8))
    assert (here(found, 1), here(found, 2)[:4]) == stay
    assert len(found.table.passing) == found.stream_slots
    assert set(found.policy.keys()) | set(passing(found)) == set(found.table.keys)


def test_in_the_end_every_layer_lacks_as_many_and_all_are_neighbours() -> None:
    layers, policy = 16, Lru()
    table, experts = SlotTable(96, [8] * layers), range(8)
    found = Residency(table, policy, Counters(layers), [8] * layers, sweeping=True)
    for step in range(20):
        for layer in range(layers):
            found.ask(layer, [*experts][:: -1 if step % 2 else 1], DECODE)
            wanted = missing(table.where[layer], experts)
            table.arrived(found.assign(layer, wanted, experts, DECODE))
            after = (layer + 1) % layers
            lacking = missing(table.where[after], experts)
            table.arrived(found.assign_ahead(after, lacking, layer))
            table.pinned.clear()
            table.check()
    kept = [
        sorted(key.expert for key in list(policy.keys()) if key.layer == x) for x in range(layers)
    ]
    others = [sorted({*experts} - {*each}) for each in kept]
    assert all(each == list(range(each[0], each[-1] + 1)) for each in others)
    assert {len(each) for each in kept} <= {5, 6, 7}
    assert len(table.passing) == found.stream_slots == 96 - sum(map(len, kept))


def test_what_a_few_ask_for_after_a_sweep_is_kept() -> None:
    found = sweeping(20)
    for layer in range(3):
        assigned(found, layer, range(8))
    assert passing(found) == [(2, 4), (2, 5)]
    assigned(found, 2, [5])
    assert passing(found) == [(2, 4)]
    assert ExpertKey(2, 5) in set(found.policy.keys())


def test_room_ahead_is_not_that_of_who_is_used() -> None:
    found = sweeping(20)
    for layer in range(3):
        assigned(found, layer, range(8))
    used = found.ask(2, range(8), DECODE)
    assert found.assign_ahead(0, missing(found.table.where[0], range(8)), used=2) == []
    assert all(found.table.ready[slot] for slot in used)
    found.table.pinned.clear()
    assert len(found.assign_ahead(0, missing(found.table.where[0], range(8)), used=1)) == 2


def test_a_rota_prefers_who_passes_then_the_seats_then_who_is_here() -> None:
    found = residency(8)
    found.take(0, range(8))
    assert found.rotation([5, 4, 3], [2, 1]) == [2, 1]
    assert found.rotation([5, 4, 3], []) == [5, 4]
    found.table.passing.update({4: None, 1: None})
    assert found.rotation([5, 4, 3], [2, 1]) == [4, 1]


def test_who_replaces_a_passing_expert_passes_too() -> None:
    found = residency(8)
    assigned(found, 0, range(8))
    assigned(found, 1, range(8), PREFILL)
    first, second = found.table.passing
    found.replace(1, [first], [7])
    assert passing(found) == [(1, 1), (1, 7)]
    stays = found.table.where[0][5]
    found.replace(1, [stays], [6])
    assert passing(found) == [(1, 1), (1, 7)]
    found.table.check()


def test_room_is_never_made_at_the_expense_of_the_protected() -> None:
    found = residency(3)
    assigned(found, 0, range(3))
    assert found.make_room(3, {ExpertKey(0, 1)}) == 2
    assert here(found, 0) == [1]


def prompted(slots: int) -> Residency:
    """Layer 0 lived on 0 to 3; a prompt's layer 1 has chosen 2 and 5 often, the others once."""
    table, policy = SlotTable(slots, EXPERTS), NextUse()
    found = Residency(table, policy, Counters(len(EXPERTS)), EXPERTS)
    for experts in (range(slots), range(4), range(4)):
        assigned(found, 0, experts)
    counts = tuple(10 if expert in (2, 5) else 1 for expert in range(8))
    found.ask(1, range(8), PREFILL, Routed(10, counts))
    return found


def test_a_prompts_favourites_stay_instead_of_who_is_expected_later() -> None:
    found = prompted(8)
    assert found.admit(1, range(8), range(8)) == [2, 5, 0, 1, 3, 4, 6, 7]
    assert here(found, 0) == [0, 1, 2, 3, 6, 7]
    slots = found.assign(1, [2, 5, 0, 1, 3, 4, 6, 7], range(8), PREFILL)
    assert passing(found) == [(1, 0), (1, 1)]
    assert len(slots) == 4


def test_nobody_stays_instead_of_who_is_expected_sooner() -> None:
    found = prompted(4)
    assert found.admit(1, range(8), range(8)) == list(range(8))
    assert here(found, 0) == [0, 1, 2, 3]


def test_free_slots_go_to_a_prompts_favourites() -> None:
    table = SlotTable(2, EXPERTS)
    found = Residency(table, NextUse(), Counters(len(EXPERTS)), EXPERTS)
    found.ask(1, range(4), PREFILL, Routed(10, (1, 9, 1, 9)))
    assert found.admit(1, range(4), range(4)) == [1, 3, 0, 2]


def test_a_policy_that_knows_nothing_of_absent_experts_admits_none() -> None:
    found = residency(4)
    assigned(found, 0, range(4))
    found.ask(1, range(4), PREFILL, Routed(10, (1, 9, 1, 9)))
    assert found.admit(1, range(4), range(4)) == [0, 1, 2, 3]
    assert here(found, 0) == [0, 1, 2, 3]


def test_loading_experts_are_not_missing() -> None:
    assert missing([-1, 4, -1, 0], [0, 1, 2, 3]) == [0, 2]
