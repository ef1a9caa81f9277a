"""What a lease yields, in which order, and what it holds meanwhile."""

from collections.abc import Callable, Sequence

import pytest

from manual_reader import Bench
from moestro.cache import ExpertCache, Lease, PackInvalid, PackSpec, Phase, ReadFailed
from tiny_packs import assert_is

Make = Callable[[int], Bench]
DECODE = Phase.DECODE


def run(cache: ExpertCache, layer: int, experts: Sequence[int], phase: Phase = DECODE) -> list[int]:
    """One whole event; checks every yielded expert's bytes and the counters at every turn."""
    yielded = []
    with cache.acquire(layer, experts, phase) as lease:
        for expert, tensors in lease:
            assert_is(tensors, cache._pack.spec, layer, expert)
            cache.check()
            assert_is(tensors, cache._pack.spec, layer, expert)
            yielded.append(expert)
    cache.check()
    return yielded


def test_residents_come_first_in_the_order_asked(bench: Make) -> None:
    made = bench(12)
    run(made.cache, 0, [4, 1])
    assert run(made.cache, 0, [0, 4, 3, 1]) == [4, 1, 0, 3]


def test_the_others_come_as_they_arrive(bench: Make) -> None:
    made = bench(12)
    with made.cache.acquire(0, [0, 2, 4], DECODE) as lease:
        assert [each.experts for each in made.reader.queued] == [range(1), range(2, 3), range(4, 5)]
        made.reader.finish(1)
        made.reader.finish(1)
        assert [expert for expert, _ in lease] == [2, 4, 0]
    made.cache.check()


def test_all_misses_are_one_submission_with_neighbours_together(bench: Make) -> None:
    made = bench(12)
    with made.cache.acquire(0, [5, 0, 1, 3, 4], DECODE) as lease:
        assert [[each.experts for each in s] for s in made.reader.submissions] == [
            [range(0, 2), range(3, 6)]
        ]
        assert sorted(expert for expert, _ in lease) == [0, 1, 3, 4, 5]


def test_a_hit_neither_reads_nor_waits(bench: Make) -> None:
    made = bench(12)
    run(made.cache, 0, [0, 1])
    waits = made.reader.waits
    run(made.cache, 0, [1, 0])
    assert len(made.reader.submissions) == 1
    assert made.reader.waits == waits


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_union_larger_than_the_slots_comes_in_waves(bench: Make, slots: int, layer: int) -> None:
    made = bench(slots)
    for _ in range(2):
        assert sorted(run(made.cache, layer, range(6))) == list(range(6))
    stats = made.cache.stats()
    assert stats.hits + stats.misses == 12
    assert stats.misses == stats.demand_loads
    assert stats.slots_used == slots


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("layer", [0, 2])
def test_groups_are_the_residents_and_then_whoever_has_come(
    bench: Make, slots: int, layer: int
) -> None:
    made = bench(slots)
    residents = run(made.cache, layer, [3, 1])
    found: list[list[int]] = []
    with made.cache.acquire(layer, [1, 0, 5, 3, 2], DECODE) as lease:
        for group in lease.groups():
            made.cache.check()
            for expert, tensors in group:
                assert_is(tensors, made.cache._pack.spec, layer, expert)
            found.append([expert for expert, _ in group])
            if made.reader.queued:
                made.reader.finish(0)
    made.cache.check()
    assert sorted(expert for group in found for expert in group) == [0, 1, 2, 3, 5]
    if slots >= 5:
        assert sorted(residents) == sorted(found[0])
        assert found[0] == [1, 3], "residents in the order of the request"
    with pytest.raises(RuntimeError, match="once"):
        next(lease.groups())


def test_whoever_has_come_by_then_is_in_the_first_group(bench: Make) -> None:
    made = bench(12)
    run(made.cache, 0, [3, 1])
    with made.cache.acquire(0, [1, 0, 5, 3], DECODE) as lease:
        assert lease.coming
        while made.reader.queued:
            made.reader.finish(0)
        groups = [[expert for expert, _ in group] for group in lease.groups()]
    assert groups == [[1, 3, 0, 5]], "residents first"
    made.cache.check()


def test_a_group_is_whole_until_the_next_one(bench: Make) -> None:
    """Slots of a group are given to those who wait when the whole group is done, not before."""
    made = bench(3)
    with made.cache.acquire(0, range(6), DECODE) as lease:
        for group in lease.groups():
            while made.reader.queued:
                made.reader.finish(0)
            for expert, tensors in group:
                assert_is(tensors, made.cache._pack.spec, 0, expert)


def test_waves_never_take_what_was_not_yielded(bench: Make) -> None:
    made = bench(3)
    run(made.cache, 0, [0, 1, 2])
    with made.cache.acquire(0, [2, 5, 4, 3, 1], DECODE) as lease:
        seen = []
        for expert, tensors in lease:
            assert_is(tensors, made.cache._pack.spec, 0, expert)
            seen.append(expert)
            if expert == 2:  # expert 1 waits its turn: only the third slot was given away
                assert [each.experts for each in made.reader.queued] == [range(3, 4)]
                assert made.cache._table.where[0][1] >= 0
    assert seen == [2, 1, 3, 4, 5]


def test_half_of_the_slots_is_read_into_while_the_other_half_computes(bench: Make) -> None:
    made = bench(4)
    with made.cache.acquire(0, range(6), DECODE) as lease:
        turns = iter(lease)
        for _ in range(2):
            next(turns)
        assert not made.reader.queued  # 0..3 came in one read; one of them is done
        next(turns)
        assert [each.experts for each in made.reader.queued] == [range(4, 6)]
        assert [expert for expert, _ in turns] == [3, 4, 5]


def test_only_one_lease_is_open_at_a_time(bench: Make) -> None:
    made = bench(4)
    with (
        made.cache.acquire(0, [0], DECODE),
        pytest.raises(RuntimeError, match="leave its block first"),
    ):
        made.cache.acquire(1, [0], DECODE)
    run(made.cache, 1, [0])


def test_a_lease_is_iterated_once(bench: Make) -> None:
    with bench(4).cache.acquire(0, [0], DECODE) as lease:
        assert len(list(lease)) == 1
        with pytest.raises(RuntimeError, match="iterated once"):
            list(lease)


@pytest.mark.parametrize("experts", [[1, 1], [-1], [0, -2]])
def test_experts_that_cannot_be_are_refused(bench: Make, experts: list[int]) -> None:
    made = bench(4)
    with pytest.raises(ValueError, match="distinct"):
        made.cache.acquire(0, experts, DECODE)
    with pytest.raises(IndexError):
        made.cache.acquire(0, [6], DECODE)
    run(made.cache, 0, [0])


def test_an_event_of_nobody_is_allowed(bench: Make) -> None:
    assert run(bench(4).cache, 0, []) == []


class Stop(Exception):
    pass


def left_early(cache: ExpertCache, lease: Lease, turns: int) -> None:
    with pytest.raises(Stop), lease:
        for turn, _ in enumerate(lease):
            if turn == turns:
                raise Stop
        raise Stop


@pytest.mark.parametrize("turns", [0, 1, 2, 9])
@pytest.mark.parametrize("slots", [1, 3, 6])
def test_leaving_early_ends_every_read_first(bench: Make, slots: int, turns: int) -> None:
    made = bench(slots)
    left_early(made.cache, made.cache.acquire(0, range(6), DECODE), turns)
    made.cache.check()
    assert not made.reader.queued
    assert not made.cache._table.pinned
    assert sorted(run(made.cache, 1, range(6))) == list(range(6))


def test_leaving_before_the_first_turn(bench: Make) -> None:
    made = bench(2)
    with made.cache.acquire(0, range(6), DECODE):
        pass
    made.cache.check()
    stats = made.cache.stats()
    assert (stats.misses, stats.demand_loads) == (6, 2)  # four were never started


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_a_failed_read_fails_the_event_and_nothing_else(bench: Make, slots: int) -> None:
    made = bench(slots)
    run(made.cache, 1, [0])
    made.reader.failures = [ReadFailed("the disk said no")]
    with (
        pytest.raises(ReadFailed, match="said no"),
        made.cache.acquire(0, [0, 2, 4], DECODE) as lease,
    ):
        list(lease)
    made.cache.check()
    assert made.cache._table.where[0][0] < 0
    assert sorted(run(made.cache, 0, [0, 2, 4])) == [0, 2, 4]


def test_a_failure_while_leaving_is_not_raised_over_the_first_one(bench: Make) -> None:
    made = bench(6)
    made.reader.failures = [ReadFailed("first"), ReadFailed("second")]
    with (
        pytest.raises(ReadFailed, match="first"),
        made.cache.acquire(0, [0, 2, 4], DECODE) as lease,
    ):
        list(lease)
    made.cache.check()
    assert made.cache.stats().demand_loads == 1


def test_stalls_are_counted_by_phase(bench: Make) -> None:
    made = bench(6)
    run(made.cache, 0, [0], Phase.PREFILL)
    first = made.cache.stats()
    assert first.prefill_stall_s > 0
    assert first.decode_stall_s == 0
    run(made.cache, 0, [1], Phase.DECODE)
    assert made.cache.stats().prefill_stall_s == first.prefill_stall_s
    assert made.cache.stats().decode_stall_s > 0


def test_a_corrupt_blob_of_a_big_pack_fails_its_first_use(
    pack_with_flipped_tail: ExpertCache, spec: PackSpec
) -> None:
    cache = pack_with_flipped_tail
    with pytest.raises(PackInvalid, match="expert 5"), cache.acquire(2, [5], DECODE) as lease:
        list(lease)
    cache.check()
    assert run(cache, 2, [3]) == [3]


def test_a_prompt_reads_into_its_share_and_leaves_the_rest_alone(bench: Make) -> None:
    made = bench(8)
    for layer in (0, 1):
        run(made.cache, layer, range(4))
    with made.cache.acquire(2, range(6), Phase.PREFILL) as lease:
        assert [each.experts for each in made.reader.queued] == [range(2)]
        assert sorted(expert for expert, _ in lease) == list(range(6))
    made.cache.check()
    where = made.cache._table.where
    assert sum(slot >= 0 for row in where[:2] for slot in row) == 6
    assert made.cache.stats().slots_used == 8


def test_a_rota_is_kept_although_reads_end_in_another_order(bench: Make) -> None:
    made = bench(8)
    for layer in (0, 1):
        run(made.cache, layer, range(4))
    with made.cache.acquire(2, [0, 2, 4, 5], Phase.PREFILL) as lease:
        turns = iter(lease)
        assert [each.experts for each in made.reader.queued] == [range(1), range(2, 3)]
        made.reader.finish(1)
        assert next(turns)[0] == 2
        made.reader.finish(0)
        assert next(turns)[0] == 0
        assert not made.reader.queued  # 2 is done, but 0 has to go first
        assert [expert for expert, _ in turns] == [4, 5]
    made.cache.check()
    assert [expert for expert, slot in enumerate(made.cache._table.where[2]) if slot >= 0] == [4, 5]
