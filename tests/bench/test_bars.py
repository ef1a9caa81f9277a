"""The arithmetic of the bars."""

import pytest
from full.bars import (
    Bar,
    Link,
    bound_s,
    expected_distinct,
    medians,
    ratio_bar,
    rows_per_expert,
    share_bar,
)
from full.geometry import OLMOE, TINY
from full.p9_quality import compare


def test_a_bar_is_met_from_its_value_on() -> None:
    assert ratio_bar("P1", 5.0, 5.0, 1.0).met
    assert not ratio_bar("P1", 4.9, 5.0, 1.0).met
    assert Bar("P5", 0.5, 0.5, "ms", at_most=True).met
    assert not Bar("P5", 0.51, 0.5, "ms", at_most=True).met


def test_a_bar_says_what_was_wanted() -> None:
    line = ratio_bar("P2 against llama.cpp", 60.0, 20.0, 3.5).line()
    assert line == "P2 against llama.cpp: 3 x (bar >= 3.5): MISSED"
    assert share_bar("P3", 0.9, 1.0, 85).line().endswith("90 % of the ceiling (bar >= 85): met")


def test_the_bound_is_the_slower_of_compute_and_link() -> None:
    link = Link(100.0, latency_s=0.5)
    assert bound_s(2.0, 100.0, link) == 2.0
    assert bound_s(2.0, 300.0, link) == 3.0
    assert bound_s(2.0, 300.0, link, transfers=2) == 4.0


def test_one_token_asks_for_k_experts_and_many_for_all() -> None:
    assert expected_distinct(64, 8, 1) == pytest.approx(8)
    assert expected_distinct(64, 8, 512) == pytest.approx(64, abs=1e-6)
    assert rows_per_expert(64, 8, 512) == pytest.approx(64)
    assert rows_per_expert(64, 8, 1) == pytest.approx(1)


def test_active_weights_of_olmoe_are_its_1_billion() -> None:
    assert 1.1e9 < OLMOE.active_numbers < 1.3e9
    assert TINY.active_numbers < TINY.numbers


def test_medians_leave_out_what_a_turn_lacks() -> None:
    assert medians([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": None}, {"a": 8.0}]) == {"a": 3.0}
    assert medians([]) == {}


def test_the_same_scores_do_not_diverge() -> None:
    import torch

    scores = [torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).log_softmax(-1)]
    found = compare(scores, scores, [[1, 2, 3, 4, 5]])
    assert found["mean_kl"] == pytest.approx(0)
    flat = compare(scores, [torch.zeros(5, 7).log_softmax(-1)], [[1, 2, 3, 4, 5]])
    assert flat["perplexity"] == pytest.approx(7) and flat["mean_kl"] > 0
