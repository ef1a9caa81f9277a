"""Prefetch, statistics, and the faults that `check` finds."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manual_reader import Bench, ManualReader
from moestro.cache import (
    CacheStats,
    DirectReader,
    ExpertCache,
    ExpertKey,
    Lru,
    Pack,
    PackSpec,
    Phase,
    ReadFailed,
    SlotPlan,
    plan_slots,
)
from tiny_packs import assert_is, build_tiny, tiny_spec

Make = Callable[[int], Bench]
DECODE = Phase.DECODE


def run(cache: ExpertCache, layer: int, experts: list[int]) -> list[int]:
    with cache.acquire(layer, experts, DECODE) as lease:
        yielded = []
        for expert, tensors in lease:
            assert_is(tensors, cache._pack.spec, layer, expert)
            yielded.append(expert)
    cache.check()
    return yielded


def plan(spec: PackSpec, slots: int) -> SlotPlan:
    return plan_slots(slots * spec.slot_bytes, spec, 1)


def give_away(cache: ExpertCache, key: ExpertKey) -> None:
    cache._table.pinned.clear()
    cache._residency.evict([cache._table.where[key.layer][key.expert]])


def kept(cache: ExpertCache) -> set[ExpertKey]:
    return set(cache._policy.keys())


class TestPrefetch:
    def test_what_arrived_in_time_is_a_prefetch_hit_once(self, bench: Make) -> None:
        made = bench(6)
        assert made.cache.prefetch(1, [3, 4], 2) == 2
        made.reader.finish_all()
        run(made.cache, 1, [3])
        run(made.cache, 1, [3])
        stats = made.cache.stats()
        assert (stats.prefetch_hits, stats.hits, stats.misses) == (1, 1, 0)
        assert (stats.prefetches_used, stats.prefetch_loads, stats.demand_loads) == (1, 2, 0)
        assert stats.prefetch_bytes == 2 * 4096

    def test_what_is_still_moving_is_a_miss_and_late(self, bench: Make) -> None:
        made = bench(6)
        assert made.cache.prefetch(1, [3], 1) == 1
        assert run(made.cache, 1, [2, 3]) == [3, 2]
        stats = made.cache.stats()
        assert (stats.misses, stats.prefetch_hits, stats.prefetches_late) == (2, 0, 1)
        assert (stats.demand_loads, stats.prefetch_loads) == (1, 1)
        run(made.cache, 1, [3])
        assert made.cache.stats().hits == 1

    def test_what_nobody_asked_for_is_wasted_when_it_goes(self, bench: Make) -> None:
        made = bench(2)
        made.cache.prefetch(1, [3], 1)
        made.reader.finish_all()
        run(made.cache, 0, [0, 1])
        assert made.cache.stats().prefetches_wasted == 1

    def test_best_guesses_first_and_no_more_than_the_limit(self, bench: Make) -> None:
        made = bench(6)
        run(made.cache, 1, [5])
        assert made.cache.prefetch(1, [5, 4, 4, 0, 2], 2) == 2
        assert {key.expert for key in kept(made.cache)} == {5, 4, 0}

    def test_nothing_is_started_when_all_are_here(self, bench: Make) -> None:
        made = bench(6)
        run(made.cache, 1, [5])
        assert made.cache.prefetch(1, [5], 3) == 0
        assert made.cache.stats().prefetches_dropped == 0

    def test_it_waits_for_nobody_s_link(self, bench: Make) -> None:
        made = bench(6)
        assert made.cache.prefetch(1, [0], 1) == 1
        assert made.cache.prefetch(1, [1], 1) == 0  # another one moves
        made.reader.finish_all()
        assert made.cache.prefetch(1, [1], 1) == 1
        with made.cache.acquire(0, [0, 2], DECODE) as lease:
            turns = iter(lease)
            next(turns)
            assert made.cache.prefetch(1, [2], 1) == 0  # a demanded one moves
            next(turns)
            made.reader.finish_all()
            assert made.cache.prefetch(1, [2], 1) == 1  # all came, the lease is still open
        assert made.cache.stats().prefetches_dropped == 2
        made.cache.check()

    def test_it_yields_to_reads_that_wait_for_a_slot(self, bench: Make) -> None:
        made = bench(4)
        run(made.cache, 0, [0, 1, 2, 3])
        with made.cache.acquire(0, range(6), DECODE):
            assert not made.reader.queued
            assert made.cache.prefetch(1, [2], 1) == 0
        assert made.cache.stats().prefetches_dropped == 1

    def test_arrivals_it_sees_reach_the_open_lease(self, bench: Make) -> None:
        made = bench(6)
        with made.cache.acquire(0, [0, 2], DECODE) as lease:
            made.reader.finish_all()
            assert made.cache.prefetch(1, [0], 1) == 1
            assert [expert for expert, _ in lease] == [0, 2]
        assert made.reader.waits == 0

    def test_a_failure_it_sees_reaches_the_open_lease(self, bench: Make) -> None:
        made = bench(6)
        made.reader.failures = [ReadFailed("no")]
        with pytest.raises(ReadFailed), made.cache.acquire(0, [0], DECODE) as lease:
            made.reader.finish_all()
            made.cache.prefetch(1, [0], 1)
            list(lease)

    def test_it_evicts_nothing_pinned_or_guessed(self, bench: Make) -> None:
        made = bench(4)
        run(made.cache, 1, [0, 1])
        run(made.cache, 0, [0, 1])
        with made.cache.acquire(0, [0, 1], DECODE) as lease:
            assert made.cache.prefetch(1, [0, 1, 2], 1) == 0
            assert made.cache.prefetch(1, [1, 3, 2], 2) == 1
            made.cache.check()
            assert len(list(lease)) == 2
        assert kept(made.cache) == {(0, 0), (0, 1), (1, 1), (1, 3)}
        assert made.cache.stats().prefetches_dropped == 2

    def test_a_demand_waits_for_a_prefetch_that_has_all_slots(self, bench: Make) -> None:
        made = bench(1)
        made.cache.prefetch(1, [0], 1)
        assert run(made.cache, 0, [4, 5]) == [4, 5]
        stats = made.cache.stats()
        assert (stats.prefetches_wasted, stats.prefetch_loads, stats.demand_loads) == (1, 1, 2)

    @pytest.mark.parametrize("asked", [True, False])
    def test_a_failed_one_frees_its_slot(self, bench: Make, asked: bool) -> None:
        made = bench(3)
        made.reader.failures = [ReadFailed("no")]
        made.cache.prefetch(1, [0], 1)
        if asked:
            with pytest.raises(ReadFailed), made.cache.acquire(1, [0], DECODE) as lease:
                list(lease)
        else:
            made.reader.finish_all()
        run(made.cache, 0, [0, 1, 2])
        stats = made.cache.stats()
        assert stats.prefetches_wasted == (not asked)
        assert stats.prefetches_late == asked
        assert stats.prefetch_loads == 0
        assert run(made.cache, 1, [0]) == [0]


def test_statistics_of_a_short_life(bench: Make) -> None:
    made = bench(3)
    run(made.cache, 0, [0, 1])
    run(made.cache, 2, [5, 0])
    run(made.cache, 0, [0, 1])
    stats = made.cache.stats()
    assert [(each.name, each.hits, each.misses, each.evictions) for each in stats.layers] == [
        ("layers.0.mlp.experts", 1, 3, 1),
        ("layers.1.mlp.experts", 0, 0, 0),
        ("layers.2.mlp.experts", 0, 2, 1),
    ]
    assert stats.lookups == 6
    assert stats.loads == stats.misses == 5
    assert stats.loaded_bytes == 3 * 4096 + 2 * 8192  # strides: what was read
    assert stats.demand_read_s == pytest.approx(0.25 * len(made.reader.submissions), rel=1)
    assert (stats.slots, stats.slots_used, stats.slot_bytes) == (3, 3, 8192)
    assert stats.capacity_bytes == stats.used_bytes == 3 * 8192


def test_closing_twice_is_closing(bench: Make) -> None:
    made = bench(3)
    made.cache.close()
    made.cache.close()
    assert made.reader.closed


@pytest.mark.parametrize(
    "plant",
    [
        lambda cache: cache._policy.removed(ExpertKey(0, 0)),
        lambda cache: cache._policy.added(ExpertKey(2, 3)),
        lambda cache: cache._table.pinned.clear(),
        lambda cache: cache._table.pinned.add(cache._table.where[1][1]),
        # a slot in use is given away: the resident's, then the one that is read into
        lambda cache: (
            cache._table.pinned.clear(),
            cache._residency.evict([cache._table.where[0][0]]),
        ),
        lambda cache: cache._table.arrived([cache._table.where[0][2]]),
        lambda cache: cache._table.failed(cache._table.where[0][2]),
        lambda cache: cache._loader._under_way.clear(),
        lambda cache: cache._counters.hits.__setitem__(0, 9),
        lambda cache: cache._counters.misses.__setitem__(0, 9),
        lambda cache: setattr(cache._counters, "late", 1),
        lambda cache: setattr(cache._counters, "wasted", 1),
        lambda cache: setattr(cache._counters.demand, "started", 1),
        lambda cache: setattr(cache._counters.demand, "loads", 1),
        lambda cache: setattr(cache._counters.demand, "bytes", 4096),
        lambda cache: cache._counters.evictions.__setitem__(0, 1),
        lambda cache: cache._counters.loads.__setitem__(0, 7),
        lambda cache: cache._table.passing.update(dict.fromkeys(cache._table._free)),
        lambda cache: cache._table.passing.update(dict.fromkeys(cache._table.where[0][:3])),
    ],
)
def test_planted_faults_are_found(bench: Make, plant: Callable[[ExpertCache], object]) -> None:
    cache = bench(5).cache
    run(cache, 1, [1])
    run(cache, 0, [0])
    with cache.acquire(0, [0, 2], DECODE):
        cache.check()
        plant(cache)
        with pytest.raises(AssertionError, match="against"):
            cache.check()
        cache._loader._under_way.clear()  # nothing to wait for in a broken cache
        cache._lease._coming.clear()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    pack = build_tiny(tmp_path_factory.mktemp("shared") / "tiny.pack", tiny_spec(6, 6, 6))
    yield pack
    pack.close()


EVENTS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1, unique=True)), max_size=40
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(events=EVENTS, slots=st.integers(6, 18))
def test_residency_is_that_of_a_textbook_lru(
    shared: Pack, events: list[tuple[int, list[int]]], slots: int
) -> None:
    """Events that fit: who is here depends on the events alone, never on who was here before."""
    reader = ManualReader(shared)
    cache = ExpertCache(shared, plan(shared.spec, slots), policy=Lru(), reader=reader)
    book: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for layer, experts in events:
        wanted = [(layer, expert) for expert in experts]
        hits += sum(key in book for key in wanted)
        assert sorted(run(cache, layer, experts)) == sorted(experts)
        there = [key for key in wanted if key in book]
        for key in [*there, *sorted(set(wanted) - set(there))]:
            book[key] = None
            book.move_to_end(key)
        while len(book) > slots:
            book.popitem(last=False)
        assert kept(cache) == set(book)
    stats = cache.stats()
    assert stats.hits == hits
    assert stats.misses == stats.demand_loads == sum(len(each) for _, each in events) - hits


def test_a_sweep_reads_the_next_layer_ahead(tmp_path: Path) -> None:
    """After the first turn whoever computes never waits again, and reads once what is missing."""
    pack = build_tiny(tmp_path / "tiny.pack", tiny_spec(24, 24, 24))
    reader = ManualReader(pack)
    cache = ExpertCache(pack, plan(pack.spec, 68), reader=reader, sweeping=True)

    def turn() -> CacheStats:
        for layer in range(3):
            with cache.acquire(layer, range(24), Phase.DECODE) as lease:
                assert len([expert for expert, _ in lease]) == 24
            reader.finish_all()
            cache.check()
        return cache.stats()

    for _ in range(3):
        turn()
    assert cache.sweeping
    before, after = turn(), turn()
    assert after.misses == before.misses
    assert after.loads - before.loads == after.prefetches_used - before.prefetches_used
    assert 0 < after.loads - before.loads <= 72 - 68 + 8
    assert after.prefetches_wasted == 0
    cache.close()


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5, 18])
def test_with_real_threads_every_byte_is_right(tmp_path: Path, slots: int, readers: int) -> None:
    spec, dice = tiny_spec(6, 6, 6), random.Random(slots)
    pack = build_tiny(tmp_path / "real.pack", spec)
    cache = ExpertCache(pack, plan(spec, slots), reader=DirectReader(pack, readers))
    for turn in range(200):
        layer = turn % 3
        experts = dice.sample(range(6), dice.randint(1, 6))
        assert sorted(run(cache, layer, experts)) == sorted(experts)
        cache.prefetch((layer + 1) % 3, dice.sample(range(6), 3), 1)
    stats = cache.stats()
    assert stats.lookups == stats.hits + stats.prefetch_hits + stats.misses
    assert stats.demand_loads + stats.prefetches_late == stats.misses
    cache.close()
