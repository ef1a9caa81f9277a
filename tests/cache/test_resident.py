"""A layer event without a lease: only where nothing can be evicted, and counted like any other."""

from collections.abc import Callable

import pytest

from manual_reader import Bench
from moestro.cache import ExpertCache, Phase, Routed
from tiny_packs import assert_is

Make = Callable[[int], Bench]
DECODE = Phase.DECODE
ALL = 18


def fill(cache: ExpertCache) -> None:
    for layer in range(3):
        with cache.acquire(layer, range(6), DECODE) as lease:
            assert len(list(lease)) == 6
    cache.check()


def counted(cache: ExpertCache) -> tuple[int, int, int]:
    cache.check()
    stats = cache.stats()
    return stats.lookups, stats.hits, stats.misses


class Recorder:
    """A trace that only remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def record(self, *event: object) -> None:
        self.events.append(event)


def test_a_layer_that_is_here_is_lent_whole_and_who_was_asked_for_counted(bench: Make) -> None:
    cache = bench(ALL).cache
    fill(cache)
    lookups, hits, misses = counted(cache)
    views = cache.resident(1, [4, 0, 3], DECODE)
    assert views is not None
    for expert, tensors in enumerate(views):
        assert_is(tensors, cache.spec, 1, expert)
    assert len(views) == 6
    assert counted(cache) == (lookups + 3, hits + 3, misses)
    assert [layer.hits for layer in cache.stats().layers] == [0, 3, 0]
    assert cache.resident(1, [2], DECODE) is views, "whoever knows them knows them again"


def test_it_is_recorded_as_the_event_it_is(bench: Make) -> None:
    cache, trace = bench(ALL).cache, Recorder()
    cache.record(trace)  # type: ignore[arg-type]
    assert cache.resident(0, [1], DECODE) is None
    fill(cache)
    trace.events.clear()
    routed = Routed(9, (4, 5))
    cache.resident(2, [5, 1], Phase.PREFILL, routed)
    cache.record(None)
    cache.resident(2, [5, 1], DECODE)
    assert trace.events == [(2, [5, 1], Phase.PREFILL, routed)]


def test_what_is_missing_is_not_lent_and_not_counted(bench: Make) -> None:
    cache = bench(ALL).cache
    with cache.acquire(1, [0, 1], DECODE) as lease:
        list(lease)
    before = counted(cache)
    assert cache.resident(1, [0, 2], DECODE) is None
    assert cache.resident(0, [0], DECODE) is None
    assert cache.resident(1, [1, 0], DECODE) is None, "not all of its layer are here"
    assert counted(cache) == before
    with cache.acquire(1, [2, 3, 4, 5], DECODE) as lease:
        list(lease)
    assert cache.resident(1, [1, 0], DECODE) is not None


def test_nothing_is_lent_beside_a_lease_or_a_read(bench: Make) -> None:
    made = bench(ALL)
    with made.cache.acquire(1, range(6), DECODE) as lease:
        list(lease)
        assert made.cache.resident(1, [0], DECODE) is None
    assert made.cache.prefetch(2, [3], 1) == 1
    assert made.cache.resident(1, [0], DECODE) is None
    made.reader.finish_all()
    with made.cache.acquire(2, [3], DECODE) as lease:
        list(lease)
    assert made.cache.resident(1, [0], DECODE) is not None
    made.cache.check()


def test_what_was_read_ahead_is_a_prefetch_hit_once(bench: Make) -> None:
    made = bench(ALL)
    made.cache.prefetch(2, [3], 1)
    made.reader.finish_all()
    with made.cache.acquire(2, [0, 1, 2, 4, 5], DECODE) as lease:  # sees that it came
        list(lease)
    assert made.cache.resident(2, [3], DECODE) is None
    assert made.cache.resident(2, [0, 3], DECODE) is None
    assert made.cache.resident(2, [0], DECODE) is not None
    with made.cache.acquire(2, [3], DECODE) as lease:
        list(lease)
    assert made.cache.resident(2, [3], DECODE) is not None
    stats = made.cache.stats()
    assert (stats.prefetch_hits, stats.prefetches_used, stats.hits) == (1, 1, 2)
    made.cache.check()


@pytest.mark.parametrize("slots", [1, 17])
def test_what_could_be_evicted_is_not_lent(bench: Make, slots: int) -> None:
    cache = bench(slots).cache
    with cache.acquire(1, [0], DECODE) as lease:
        list(lease)
    assert cache.resident(1, [0], DECODE) is None
    assert counted(cache) == (1, 0, 1)
