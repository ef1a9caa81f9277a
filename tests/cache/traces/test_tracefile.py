"""What is written is what is read, and what is no trace is refused with its line."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from manual_reader import Bench
from moestro.cache import (
    LiveCount,
    PackSpec,
    Phase,
    Routed,
    TraceEvent,
    TraceInvalid,
    TraceReader,
    TraceWriter,
)

LAYER = {"name": "x", "num_experts": 6, "stride_bytes": 4096}
DECODE, PREFILL = Phase.DECODE, Phase.PREFILL


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_a_run_is_written_as_it_was_asked(
    bench: Callable[[int], Bench], tmp_path: Path, spec: PackSpec
) -> None:
    path, cache = tmp_path / "run.trace", bench(6).cache
    with cache.acquire(0, [1], DECODE):
        pass
    with TraceWriter(path, spec) as writer:
        cache.record(writer)
        for layer, experts, phase in ((0, [3, 1], PREFILL), (2, [5], PREFILL), (0, [2], DECODE)):
            with cache.acquire(layer, experts, phase):
                pass
        cache.record(None)
        with cache.acquire(1, [1], DECODE):
            pass
    reader = TraceReader(path)
    assert reader.header.model == "tiny"
    assert [layer.name for layer in reader.header.layers] == [x.name for x in spec.layers]
    assert reader.header.experts_per_layer == [6, 6, 6]
    assert [layer.stride_bytes for layer in reader.header.layers] == [4096, 4096, 8192]
    events = [
        TraceEvent(0, PREFILL, 0, (3, 1)),
        TraceEvent(0, PREFILL, 2, (5,)),
        TraceEvent(1, DECODE, 0, (2,)),
    ]
    assert list(reader) == events
    assert list(reader) == events
    assert lines(path)[1] == '[0,"p",0,[3,1]]'


def test_what_the_recorder_counted_comes_at_the_end(tmp_path: Path, spec: PackSpec) -> None:
    path = tmp_path / "live.trace"
    with TraceWriter(path, spec) as writer:
        writer.record(0, [1], DECODE)
        writer.live(LiveCount(slots=4, hits=1, lookups=2))
    reader = TraceReader(path)
    assert reader.live is None
    assert len(list(reader)) == 1
    assert reader.live == LiveCount(4, 1, 2)


def test_a_prompts_counts_are_kept(
    bench: Callable[[int], Bench], tmp_path: Path, spec: PackSpec
) -> None:
    path, cache, routed = tmp_path / "run.trace", bench(6).cache, Routed(7, (2, 5))
    with TraceWriter(path, spec) as writer:
        cache.record(writer)
        with cache.acquire(0, [3, 1], PREFILL, routed):
            pass
    assert lines(path)[1] == '[0,"p",0,[3,1],7,[2,5]]'
    assert list(TraceReader(path)) == [TraceEvent(0, PREFILL, 0, (3, 1), routed)]


def test_traces_of_the_first_format_are_read(tmp_path: Path, spec: PackSpec) -> None:
    path = tmp_path / "old.trace"
    with TraceWriter(path, spec) as writer:
        writer.record(0, [3, 1], PREFILL)
    path.write_text(path.read_text("utf-8").replace('"moestro_trace":2', '"moestro_trace":1'))
    assert lines(path)[0].startswith('{"moestro_trace":1,')
    assert list(TraceReader(path)) == [TraceEvent(0, PREFILL, 0, (3, 1))]


def test_a_record_that_was_cut_off_is_passed_over(tmp_path: Path, spec: PackSpec) -> None:
    path = tmp_path / "cut.trace"
    with TraceWriter(path, spec) as writer:
        writer.record(0, [1], DECODE)
        writer.record(1, [1, 2], DECODE)
    path.write_text(path.read_text("utf-8")[:-4], "utf-8")
    assert [event.layer for event in TraceReader(path)] == [0]


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "7",
        "[0]",
        '[0,"x",0,[1]]',
        '[0,"d",3,[1]]',
        '[0,"d",-1,[1]]',
        '[0,"d",0,[6]]',
        '[0,"d",0,[1,1]]',
        '[0,"d",0,["1"]]',
        '[0,"d",[0],[1]]',
        '{"other": 1}',
        '{"live_decode": {"slots": 1}}',
        '[0,"p",0,[1],7]',
        '[0,"p",0,[1],7,[1,2]]',
        '[0,"p",0,[1],7,[8]]',
        '[0,"p",0,[1],7,[0]]',
        '[0,"p",0,[1],7,["1"]]',
        '[0,"p",0,[1],7,[1],1]',
        '["0","d",0,[1]]',
        '[0,"d",0.0,[1]]',
        '{"live_decode": {"slots": "1", "hits": 1, "lookups": 1}}',
        '{"live_decode": {"slots": 0, "hits": 1, "lookups": 1}}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, spec: PackSpec, line: str) -> None:
    path = tmp_path / "bad.trace"
    with TraceWriter(path, spec) as writer:
        writer.record(0, [1], DECODE)
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(TraceInvalid, match="line 3"):
        list(TraceReader(path))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]\n",
        b"{}\n",
        b"\xff\xfe\n",
        json.dumps({"moestro_trace": 9, "model": "", "layers": []}).encode() + b"\n",
        json.dumps({"moestro_trace": 1, "model": "", "layers": [{"x": 1}]}).encode() + b"\n",
        json.dumps({"moestro_trace": 1, "model": 7, "layers": []}).encode() + b"\n",
        json.dumps({"moestro_trace": 1, "model": "", "layers": ["x"]}).encode() + b"\n",
        *(
            json.dumps({"moestro_trace": 1, "model": "", "layers": [LAYER | wrong]}).encode()
            + b"\n"
            for wrong in ({"num_experts": "6"}, {"num_experts": 0}, {"stride_bytes": None})
        ),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "foreign.trace"
    path.write_bytes(header)
    with pytest.raises(TraceInvalid, match="line 1"):
        TraceReader(path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceInvalid, match="No such file"):
        TraceReader(tmp_path / "none.trace")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_ends_the_recording_and_nothing_else(
    spec: PackSpec, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TraceWriter(Path("/dev/full"), spec)
    with caplog.at_level(logging.WARNING, "moestro.cache"):
        for _ in range(2000):
            writer.record(0, [1, 2, 3], DECODE)
        writer.close()
    assert "/dev/full" in caplog.text
