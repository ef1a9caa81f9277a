"""Pages are never lost, never given twice, and follow each other where they can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.engine.step.pages import PagePool, pages_of


def test_a_run_is_preferred_and_the_smallest_that_is_long_enough() -> None:
    pool = PagePool(10)
    first, second, third = pool.take(4), pool.take(2), pool.take(4)
    assert (first, second, third) == ([0, 1, 2, 3], [4, 5], [6, 7, 8, 9])
    pool.release(first)
    pool.release(third[2:])
    assert pool.take(2) == [8, 9], "not out of the longer run"
    assert pool.take(3) == [0, 1, 2]
    pool.release(second)
    assert pool.free_pages == 3
    assert pool.take(3) == [3, 4, 5], "neighbours were joined"


def test_where_no_run_is_long_enough_the_longest_come_first() -> None:
    pool = PagePool(8)
    pages = pool.take(8)
    pool.release([pages[0], pages[2], pages[3], pages[6]])
    assert pool.take(3) == [2, 3, 0]


def test_a_shared_page_is_free_when_the_last_user_is_gone() -> None:
    pool = PagePool(4)
    own = pool.take(3)
    shared = pool.share(own[:2])
    pool.check([own, shared])
    pool.release(own)
    assert pool.free_pages == 2
    pool.check([shared])
    pool.release(shared)
    assert pool.free_pages == 4
    with pytest.raises(AssertionError, match="free already"):
        pool.release([0])
    with pytest.raises(AssertionError, match="is free"):
        pool.share([0])


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 9))))
def test_the_pool_is_what_its_owners_hold(moves: list[tuple[str, int]]) -> None:
    pool, owners = PagePool(12), list[list[int]]()
    for move, number in moves:
        if move == "take" and number <= pool.free_pages:
            owners.append(pool.take(number))
        elif owners and move == "share":
            held = owners[number % len(owners)]
            owners.append(pool.share(held[: number // 2]))
        elif owners and move == "release":
            pool.release(owners.pop(number % len(owners)))
        pool.check(owners)


def test_pages_of_tokens() -> None:
    assert [pages_of(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
