"""What every policy promises, then what is each one's own."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import DecayedFrequency, ExpertKey, Lru, NextUse, PerLayer, Policy

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))

POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": Lru,
    "frequency": DecayedFrequency,
    "next use": NextUse,
    "lru per layer": lambda: PerLayer(Lru),
    "frequency per layer": lambda: PerLayer(DecayedFrequency),
}
"""One line per policy: a new one inherits the contract below."""


@pytest.fixture(params=list(POLICIES.values()), ids=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> Policy:
    make: Callable[[], Policy] = request.param
    found = make()
    for key in (A, B, C):
        found.added(key)
    return found


class TestContract:
    def test_keeps_what_was_added_and_not_removed(self, policy: Policy) -> None:
        policy.removed(B)
        policy.added(D)
        assert set(policy.keys()) == {A, C, D}
        assert len(policy.keys()) == 3

    def test_victims_are_kept_distinct_and_unprotected(self, policy: Policy) -> None:
        victims = policy.victims(2, {B})
        assert victims is not None
        assert set(victims) == {A, C}

    def test_choosing_victims_changes_nothing(self, policy: Policy) -> None:
        assert policy.victims(3, ()) == policy.victims(3, ())
        assert set(policy.keys()) == {A, B, C}

    def test_all_or_nothing(self, policy: Policy) -> None:
        assert policy.victims(3, {B}) is None
        assert policy.victims(4, ()) is None

    def test_no_victims_is_always_possible(self, policy: Policy) -> None:
        assert policy.victims(0, {A, B, C}) == []

    def test_a_removed_key_may_come_back(self, policy: Policy) -> None:
        policy.removed(A)
        policy.added(A)
        assert set(policy.keys()) == {A, B, C}

    def test_who_has_no_slot_may_be_asked_for_and_is_not_kept(self, policy: Policy) -> None:
        policy.asked([A, D])
        policy.asked([])
        assert set(policy.keys()) == {A, B, C}
        victims = policy.victims(3, ())
        assert victims is not None
        assert set(victims) == {A, B, C}

    def test_of_one_layer_who_was_never_asked_for_leaves_first(self, policy: Policy) -> None:
        for _ in range(3):
            policy.asked([A, C])
        assert policy.victims(1, ()) == [B]

    def test_mistakes_of_the_caller_are_not_swallowed(self, policy: Policy) -> None:
        with pytest.raises(ValueError, match="already"):
            policy.added(A)
        with pytest.raises(KeyError):
            policy.removed(D)
        assert set(policy.keys()) == {A, B, C}

    @given(data=st.data())
    def test_any_life_of_three_layers(self, data: st.DataObject) -> None:
        """Random calls against a set: a choice is always complete, distinct and allowed."""
        policy, kept = data.draw(st.sampled_from(list(POLICIES.values())))(), set[ExpertKey]()
        for _ in range(data.draw(st.integers(0, 12))):
            layer = data.draw(st.integers(0, 2))
            event = [ExpertKey(layer, e) for e in data.draw(st.sets(st.integers(0, 5)))]
            policy.asked(event)
            protected = set(event) | data.draw(
                st.sets(st.sampled_from(sorted(kept))) if kept else st.just(set[ExpertKey]())
            )
            count = data.draw(st.integers(0, 6))
            victims = policy.victims(count, protected)
            if count > len(kept - protected):
                assert victims is None
                continue
            assert victims is not None
            assert len(victims) == len(set(victims)) == count
            assert set(victims) <= kept - protected
            for key in victims:
                policy.removed(key)
            for key in set(event) - kept:
                policy.added(key)
            kept = kept - set(victims) | set(event)
            assert set(policy.keys()) == kept


def test_lru_gives_up_the_event_longest_ago() -> None:
    lru = Lru()
    for key in (A, B, C, D):
        lru.added(key)
    lru.asked([C, A])
    assert lru.victims(4, ()) == [B, D, C, A]


@given(st.lists(st.lists(st.sampled_from([A, B, C, D]), unique=True, min_size=1), max_size=12))
def test_lru_ranks_by_last_event(events: list[list[ExpertKey]]) -> None:
    lru, last = Lru(), {}
    for place, key in enumerate((A, B, C, D)):
        lru.added(key)
        last[key] = (-1, place)
    for time, event in enumerate(events):
        lru.asked(event)
        last.update({key: (time, place) for place, key in enumerate(event)})
    assert lru.victims(4, ()) == sorted(last, key=lambda key: last[key])


class TestPerLayer:
    def make(self, *kept: int) -> PerLayer:
        """With so many experts of each layer kept."""
        policy = PerLayer(Lru)
        for layer, count in enumerate(kept):
            for expert in range(count):
                policy.added(ExpertKey(layer, expert))
        return policy

    def test_who_has_most_gives_until_all_have_the_same(self) -> None:
        policy = self.make(2, 5, 3)
        assert policy.victims(2, ()) == [(1, 0), (1, 1)]
        victims = policy.victims(4, ())
        assert victims is not None
        assert {layer: sum(v.layer == layer for v in victims) for layer in range(3)} == {
            0: 0,
            1: 3,
            2: 1,
        }

    def test_of_equals_the_layer_that_runs_again_last(self) -> None:
        policy = self.make(2, 2, 2)
        policy.asked([ExpertKey(1, 0)])
        assert policy.victims(3, ()) == [(1, 1), (0, 0), (2, 0)]

    def test_protected_ones_count_but_stay(self) -> None:
        policy = self.make(4, 2)
        protected = {ExpertKey(0, expert) for expert in range(3)}
        assert policy.victims(2, protected) == [(0, 3), (1, 0)]
        assert policy.victims(4, protected) is None
