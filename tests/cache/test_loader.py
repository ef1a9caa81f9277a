import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache.tiers.transfer import runs_of


@pytest.mark.parametrize(
    ("experts", "longest", "runs"),
    [
        ([], 4, []),
        ([3], 4, [(3,)]),
        ([0, 1, 2, 5, 6, 9], 4, [(0, 1, 2), (5, 6), (9,)]),
        ([0, 1, 2, 3, 4], 2, [(0, 1), (2, 3), (4,)]),
        ([0, 1, 2], 1, [(0,), (1,), (2,)]),
    ],
)
def test_neighbours_are_read_together(
    experts: list[int], longest: int, runs: list[tuple[int, ...]]
) -> None:
    assert [tuple(run) for run in runs_of(experts, longest)] == runs


@given(st.sets(st.integers(0, 60)), st.integers(1, 9))
def test_runs_are_a_partition(experts: set[int], longest: int) -> None:
    runs = list(runs_of(sorted(experts), longest))
    assert [expert for run in runs for expert in run] == sorted(experts)
    assert all(1 <= len(run) <= longest for run in runs)
