"""The few reads that time one expert."""

from collections.abc import Callable

from manual_reader import Bench
from moestro.cache import Pack
from moestro.cache.tiers.speed import TIMED_READS, time_reads

Make = Callable[[int], Bench]


def test_a_few_reads_are_timed_and_each_takes_time(pack: Pack) -> None:
    taken = time_reads(pack, most_s=60)
    assert len(taken) == TIMED_READS
    assert all(seconds > 0 for seconds in taken)


def test_one_is_timed_however_short_the_time(pack: Pack) -> None:
    assert len(time_reads(pack, most_s=0)) == 1


def test_the_cache_has_not_changed(bench: Make) -> None:
    made = bench(6)
    made.cache.time_reads(0)
    assert made.cache.stats().loads == made.cache.stats().slots_used == 0
    assert not made.reader.submissions
    made.cache.check()
