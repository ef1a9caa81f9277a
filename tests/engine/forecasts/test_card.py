"""Arithmetic of a card's forecast, by hand; the plan itself is test_planner's."""

from typing import Any

import pytest

from moestro.engine.facts import Lane, LaneChoice
from moestro.engine.forecasts import CardForecast, CardLinks, MoeLayer, Work

LAYER = MoeLayer(num_experts=8, experts_per_token=2, blob_bytes=1000, numbers=10)
LINKS = CardLinks(10_000.0, "--link", 1000.0, "--disk-speed")


def forecast(slots: int, host_slots: int, layers: int = 4) -> CardForecast:
    work = Work((LAYER,) * layers, dense_numbers=1, head_numbers=1, chunk_tokens=1000)
    plan: Any = None  # what memory it takes is not asked here
    lane = LaneChoice(Lane.PACKED, "")
    return CardForecast(
        family="mixtral",
        stored_dtype="bfloat16",
        expert_format="native",
        dense_format="native",
        has_weights=False,
        plan=plan,
        slots=slots,
        host_slots=host_slots,
        slot_bytes=1000,
        work=work,
        links=LINKS,
        lane=lane,
        formats=(),
    )


def test_what_the_card_lacks_comes_over_the_link() -> None:
    decode = forecast(slots=16, host_slots=32).decode
    assert decode.high.hit_rate == 0.5
    assert decode.high.link_bytes == pytest.approx(4 * 2 * 1000 / 2)
    assert decode.high.link_s == pytest.approx(0.4)
    assert decode.high.disk_bytes == 0
    assert decode.high.limit == "link"
    assert decode.high.tokens_per_s == pytest.approx(2.5)


def test_a_small_host_adds_its_experts_to_the_card_s_and_the_disk_brings_the_rest() -> None:
    decode = forecast(slots=16, host_slots=8).decode
    assert decode.high.disk_bytes == pytest.approx(4 * 2 * 1000 / 4)
    assert decode.high.limit == "disk"
    assert decode.high.seconds == pytest.approx(2.0)
    assert decode.low.disk_bytes >= decode.high.disk_bytes


def test_a_host_that_holds_all_never_reads() -> None:
    card = forecast(slots=2, host_slots=32)
    assert card.host_holds_all
    assert card.prefill.low.disk_bytes == 0
    assert card.prefill.low.tokens == 1000
    assert card.prefill.low.link_bytes == pytest.approx(32 * 1000), "each expert once a chunk"


def test_with_all_on_the_card_nothing_is_a_bound() -> None:
    card = forecast(slots=32, host_slots=2)
    for outlook in (card.decode, card.prefill):
        assert (outlook.low.limit, outlook.low.tokens_per_s) == ("none", None)
    assert card.resident_share == 1.0
