"""Reads ahead of a prompt's next layer: when they begin, and what they leave alone."""

import pytest

from manual_reader import Bench, ManualReader
from moestro.cache import ExpertCache, Pack, Phase, plan_slots


def made(pack: Pack, slots: int, *, sweeping: bool = True) -> Bench:
    """All slots taken: by a decode step of layer 1, then by a prompt in layer 0, which passes."""
    reader = ManualReader(pack)
    plan = plan_slots(slots * pack.spec.slot_bytes, pack.spec, 1)
    bench = Bench(ExpertCache(pack, plan, reader=reader, sweeping=sweeping), reader)
    for layer, phase in ((1, Phase.DECODE), (0, Phase.PREFILL)):
        event(bench.cache, layer, phase)
    return bench


def event(cache: ExpertCache, layer: int, phase: Phase) -> None:
    with cache.acquire(layer, range(6), phase) as lease:
        assert sorted(expert for expert, _ in lease) == list(range(6))
    cache.check()


def test_the_next_layers_first_experts_are_read_where_others_only_passed(pack: Pack) -> None:
    bench = made(pack, 8)
    cache, table = bench.cache, bench.cache._table
    assert len(table.passing) > 0
    kept, passing = set(cache._policy.keys()), len(table.passing)
    assert cache.follow_prompt(1, 6)
    (request,) = bench.reader.queued
    assert (request.layer, request.experts, request.guessed) == (2, range(passing), True)
    assert set(cache._policy.keys()) == kept, "who is kept stays"
    cache.check()
    bench.reader.finish_all()
    before = cache.stats()
    event(cache, 2, Phase.PREFILL)
    after = cache.stats()
    assert after.prefetch_hits - before.prefetch_hits == passing
    assert after.prefetches_wasted == 0


@pytest.mark.parametrize("layer, requested, sweeping", [(1, 3, True), (2, 6, True), (1, 6, False)])
def test_a_few_experts_the_last_layer_and_other_caches_are_followed_by_none(
    pack: Pack, layer: int, requested: int, sweeping: bool
) -> None:
    bench = made(pack, 8, sweeping=sweeping)
    assert not bench.cache.follow_prompt(layer, requested)
    assert not bench.reader.queued


def test_free_slots_are_left_to_the_event(pack: Pack) -> None:
    bench = made(pack, 18)
    assert bench.cache._table.free > 0
    assert not bench.cache.follow_prompt(1, 6)


def test_nothing_begins_beside_other_reads_or_in_a_lease(pack: Pack) -> None:
    bench = made(pack, 8)
    with bench.cache.acquire(1, [0], Phase.DECODE):
        assert not bench.cache.follow_prompt(1, 6)
    assert bench.cache.follow_prompt(1, 6)
    assert not bench.cache.follow_prompt(0, 6)
    bench.cache.check()
