"""The arithmetic of a forecast, against hand-made sums and a simulated LRU."""

import random
from collections import OrderedDict

import pytest

from moestro.engine.forecasts.forecast import (
    ComputeSpeed,
    LinkSpeed,
    MoeLayer,
    Work,
    decode_outlook,
    hit_rates,
    prefill_outlook,
)

LAYERS = (MoeLayer(num_experts=16, experts_per_token=4, blob_bytes=1000, numbers=500),) * 6
WORK = Work(LAYERS, dense_numbers=6000, head_numbers=2000, chunk_tokens=32)
LINK = LinkSpeed(1e6, 4e6, "given")
COMPUTE = ComputeSpeed(1e6, 8e6, 2e6, 4e6, 1, "plain")


def simulated_lru(slots: int, tokens: int = 2000) -> float:
    draw, held = random.Random(7), OrderedDict[tuple[int, int], None]()
    hits = asked = 0
    for step in range(tokens):
        for index, layer in enumerate(LAYERS):
            keys = [(index, e) for e in draw.sample(range(16), layer.experts_per_token)]
            if step > 100:
                hits += sum(key in held for key in keys)
                asked += len(keys)
            for key in keys:
                held[key] = None
                held.move_to_end(key)
            while len(held) > slots:
                held.popitem(last=False)
    return hits / asked


@pytest.mark.parametrize("slots", [6, 20, 30, 48, 60, 80, 95])
def test_a_simulated_lru_lies_between_the_two_ends(slots: int) -> None:
    low, high = hit_rates(LAYERS, slots, 1)
    assert low - 0.02 <= simulated_lru(slots) <= high + 0.02


def test_lru_finds_nothing_with_less_than_one_token_takes() -> None:
    assert hit_rates(LAYERS, 23, 1) == (0.0, 23 / 96)
    assert hit_rates(LAYERS, 24, 1) == (0.25, 0.25)


def test_a_chunk_uses_nearly_all_and_lru_keeps_none_of_it() -> None:
    low, high = hit_rates(LAYERS, 72, 32)
    assert (low, high) == (0.0, 0.75)
    assert hit_rates(LAYERS, 96, 32) == (1.0, 1.0)


def test_decode_sums() -> None:
    outlook = decode_outlook(WORK, 24, LINK, COMPUTE)
    assert outlook.low.link_bytes == pytest.approx(6 * 4 * 1000 * 0.75)
    assert outlook.low.link_s == pytest.approx(0.018)
    assert outlook.low.compute_s == pytest.approx(8000 / 1e6 + 12_000 / 2e6)
    assert outlook.low.limit == "disk"
    assert outlook.low.tokens_per_s == pytest.approx(1 / 0.018)


def test_with_all_resident_compute_is_the_limit() -> None:
    outlook = decode_outlook(WORK, 96, LINK, COMPUTE)
    assert outlook.low == outlook.high
    assert outlook.low.link_bytes == 0
    assert outlook.low.limit == "compute"
    assert outlook.low.tokens_per_s == pytest.approx(1 / 0.014)


def test_prefill_sums() -> None:
    outlook = prefill_outlook(WORK, 48, LINK, COMPUTE)
    assert outlook.low.link_bytes == pytest.approx(96_000, rel=1e-3)
    assert outlook.high.link_bytes == pytest.approx(48_000, rel=1e-3)
    assert outlook.high.compute_s == pytest.approx(32 * 6000 / 8e6 + 2000 / 1e6 + 32 * 12_000 / 4e6)
    assert outlook.high.tokens_per_s == pytest.approx(32 / outlook.high.seconds)
