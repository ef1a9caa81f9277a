"""What every policy promises, then what is each one's own."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import ExpertKey, Lru, Policy

A, B, C, D = (ExpertKey(0, expert) for expert in range(4))


@pytest.fixture(params=[Lru])
def policy(request: pytest.FixtureRequest) -> Policy:
    """One line per policy: a new one inherits the contract below."""
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

    def test_mistakes_of_the_caller_are_not_swallowed(self, policy: Policy) -> None:
        with pytest.raises(ValueError, match="already"):
            policy.added(A)
        with pytest.raises(KeyError):
            policy.removed(D)
        with pytest.raises(KeyError):
            policy.touched([D])


def test_lru_gives_up_the_event_longest_ago() -> None:
    lru = Lru()
    for key in (A, B, C, D):
        lru.added(key)
    lru.touched([C, A])
    assert lru.victims(4, ()) == [B, D, C, A]


@given(st.lists(st.lists(st.sampled_from([A, B, C, D]), unique=True, min_size=1), max_size=12))
def test_lru_ranks_by_last_event(events: list[list[ExpertKey]]) -> None:
    lru, last = Lru(), {}
    for place, key in enumerate((A, B, C, D)):
        lru.added(key)
        last[key] = (-1, place)
    for time, event in enumerate(events):
        lru.touched(event)
        last.update({key: (time, place) for place, key in enumerate(event)})
    assert lru.victims(4, ()) == sorted(last, key=lambda key: last[key])
