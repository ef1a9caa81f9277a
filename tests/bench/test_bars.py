"""The arithmetic of the bars."""

import json
from pathlib import Path

import pytest
from full.bars import (
    Bar,
    Link,
    bound_s,
    decode_bytes,
    expected_distinct,
    gain,
    medians,
    ratio_bar,
    rows_per_expert,
    share_bar,
)
from full.bench import Bench, finish
from full.geometry import OLMOE, OLMOE8, TINY
from full.p9_quality import compare
from full.places import Workshop, needed_bytes
from full.quality import FORMATS, NATIVE, Quality


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


def test_half_the_depth_is_half_of_the_experts_and_the_whole_head() -> None:
    assert OLMOE8.depth == 0.5 and OLMOE.depth == 1.0
    head = OLMOE.vocab * OLMOE.hidden
    assert OLMOE8.active_numbers - head == (OLMOE.active_numbers - head) // 2


def test_a_disk_of_15_gb_holds_half_the_depth() -> None:
    for disk_bars in (False, True):
        assert needed_bytes(OLMOE8, disk_bars=disk_bars) <= 15e9
        assert needed_bytes(OLMOE, disk_bars=disk_bars) <= 60e9


def test_a_token_reads_its_experts_slots_and_the_dense_part_in_its_format() -> None:
    slots = TINY.layers * TINY.experts_per_token * 1000
    assert decode_bytes(TINY, 1000, "int8") == slots + TINY.active_dense_numbers
    assert decode_bytes(TINY, 1000, "native") == slots + 2 * TINY.active_dense_numbers
    one_byte = decode_bytes(OLMOE, OLMOE.expert_numbers, "int8")
    assert one_byte == OLMOE.active_numbers


def test_two_threads_may_gain_less_where_the_memory_does() -> None:
    ours, memory = gain(10.0, 14.0), gain(16e9, 24e9)
    assert ours == pytest.approx(1.4) and memory == pytest.approx(1.5)
    assert ratio_bar("P1", ours, memory, 0.9).met
    assert not ratio_bar("P1", ours, gain(16e9, 32e9), 0.9).met


def test_a_bar_of_another_number_is_not_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(Workshop(tmp_path), tmp_path, TINY, tmp_path)
    bench.hold(Bar("P1 decode", 1.0, 1.0))
    bench.hold(Bar("P10 demo", 3.0, 3.0))
    finish("p1", bench, {})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["bar"] for row in found["results"]["bars"]] == ["P1 decode"]


def test_native_is_the_reference_of_every_choice_of_formats() -> None:
    assert Quality.of(2, ("int4/int8",), norms=False).formats == (NATIVE, "int4/int8")
    assert Quality.of(2, ("int8/int8", NATIVE), norms=False).formats == (NATIVE, "int8/int8")
    assert Quality.of(8, (), norms=False).formats == FORMATS


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
