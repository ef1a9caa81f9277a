"""An interrupted build goes on where it was, and never believes a damaged file."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.cache import NoDiskSpace, Pack, PackSpec, PackWriter, open_or_build
from moestro.cache.pack.file import header_bytes, layer_starts
from tiny_packs import LOG, build_tiny, layer_tensors, tiny_spec

SPEC = tiny_spec(6, 6, 6, 3, 3)
LAYERS = len(SPEC.layers)


class Stopped(Exception):
    pass


class Fill:
    """Adds what is missing, at most `most` layers; remembers which."""

    def __init__(self, spec: PackSpec = SPEC, most: int = LAYERS) -> None:
        self.spec = spec
        self.most = most
        self.added: list[int] = []

    def __call__(self, writer: PackWriter) -> None:
        for layer in writer.missing:
            if len(self.added) == self.most:
                raise Stopped
            writer.add_layer(layer, layer_tensors(self.spec, layer))
            self.added.append(layer)


def build(path: Path, fill: Fill) -> None:
    open_or_build(path, fill.spec, fill, lambda: None, LOG).close()


def stop_after(path: Path, layers: int, spec: PackSpec = SPEC) -> None:
    with pytest.raises(Stopped):
        build(path, Fill(spec, layers))


def names(path: Path) -> set[str]:
    return {found.name for found in path.parent.iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made.pack"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The pack of a build that nobody interrupts."""
    path = tmp_path_factory.mktemp("whole") / "whole.pack"
    build_tiny(path, SPEC).close()
    return path.read_bytes()


@pytest.mark.parametrize("stops", [[1], [4], [1, 1, 1], [2, 0, 2]])
def test_it_goes_on_where_it_was_stopped(
    path: Path, whole: bytes, stops: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    for count in stops:
        stop_after(path, count)
        assert names(path) == {"made.pack.lock", "made.partial", "made.journal"}
    fill, seen = Fill(), list[tuple[int, int]]()
    with caplog.at_level(logging.INFO):
        open_or_build(
            path, SPEC, fill, lambda: None, LOG, on_proof=lambda *at: seen.append(at)
        ).close()
    assert fill.added == list(range(sum(stops), LAYERS))
    assert seen == [(layer, LAYERS) for layer in range(sum(stops))]
    assert f"resuming: {sum(stops)} of 5 layers are packed" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert path.read_bytes() == whole
    assert names(path) == {"made.pack.lock", "made.pack"}


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe 00000000", b"x 00000000", b"99 00000000", b"-1 00000000", b"3 00", b"3 0000000g"],
)
def test_a_journal_line_that_nobody_could_have_written_is_passed_over(
    path: Path, whole: bytes, text: bytes
) -> None:
    """Even one whose own check is right."""
    stop_after(path, 2)
    with path.with_suffix(".journal").open("ab") as journal:
        journal.write(b"%08x %s\n" % (zlib.crc32(text), text))
    fill = Fill()
    build(path, fill)
    assert fill.added == [2, 3, 4]
    assert path.read_bytes() == whole


def test_stopped_between_the_last_layer_and_the_name(path: Path, whole: bytes) -> None:
    class Late(Fill):
        def __call__(self, writer: PackWriter) -> None:
            super().__call__(writer)
            raise Stopped

    with pytest.raises(Stopped):
        build(path, Late())
    fill = Fill()
    build(path, fill)
    assert fill.added == []
    assert path.read_bytes() == whole


def test_giving_up_while_layers_are_proved_costs_nothing(path: Path, whole: bytes) -> None:
    stop_after(path, 3)

    def stop(done: int, total: int) -> None:
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        open_or_build(path, SPEC, Fill(), lambda: None, LOG, on_proof=stop)
    fill = Fill()
    build(path, fill)
    assert fill.added == [3, 4]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "other",
    [tiny_spec(6, 6, 6, 3, 3, model="other"), tiny_spec(6, 6, 6, 3, 4), tiny_spec(6, 6, 6, 3)],
)
def test_a_partial_of_another_spec_is_thrown_away(
    path: Path, whole: bytes, other: PackSpec, caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(path, 2, other)
    fill = Fill()
    with caplog.at_level(logging.INFO):
        build(path, fill)
    assert fill.added == list(range(LAYERS))
    assert "of no use here and was removed" in caplog.text and "resuming" not in caplog.text
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_nothing(path: Path) -> None:
    stop_after(path, 2)

    def full(writer: PackWriter) -> None:
        raise NoDiskSpace("the disk filled up")

    with pytest.raises(NoDiskSpace):
        open_or_build(path, SPEC, full, lambda: None, LOG)
    assert names(path) == {"made.pack.lock"}


def test_only_the_rest_needs_room(path: Path) -> None:
    stop_after(path, 3)
    rest = header_bytes(SPEC) + sum(layer.total_bytes for layer in SPEC.layers[3:])
    build_with_room = Fill()
    open_or_build(
        path, SPEC, build_with_room, lambda: None, LOG, free_bytes=lambda folder: rest
    ).close()
    assert build_with_room.added == [3, 4]


def test_too_little_room_for_the_rest(path: Path) -> None:
    stop_after(path, 3)
    with pytest.raises(NoDiskSpace, match=r"needs [\d.]+ KiB in .*, where 9\.8 KiB are free"):
        open_or_build(path, SPEC, Fill(), lambda: None, LOG, free_bytes=lambda folder: 10_000)
    assert names(path) == {"made.pack.lock"}


def test_a_partial_longer_than_the_pack(path: Path, whole: bytes) -> None:
    stop_after(path, 2)
    os.truncate(path.with_suffix(".partial"), len(whole) + 9999)
    build(path, Fill())
    assert path.read_bytes() == whole


def test_an_old_journal_alone_is_not_believed(path: Path, whole: bytes) -> None:
    stop_after(path, 3)
    path.with_suffix(".partial").unlink()
    fill = Fill()
    build(path, fill)
    assert fill.added == list(range(LAYERS))
    assert path.read_bytes() == whole


def damaged(at: int, length: int) -> set[int]:
    """Layers with a byte in [at, at + length) of the partial."""
    first = header_bytes(SPEC)
    spans = zip(layer_starts(SPEC), SPEC.layers, strict=True)
    return {
        index
        for index, (start, layer) in enumerate(spans)
        if at < first + start + layer.total_bytes and first + start < at + length
    }


class Built:
    """A folder with a build that was stopped after some layers, for one example."""

    def __init__(self, folder: str, layers: int) -> None:
        self.path = Path(folder) / "made.pack"
        self.layers = layers
        stop_after(self.path, layers)
        self.blobs = self.path.with_suffix(".partial")
        self.journal = self.path.with_suffix(".journal")

    def resumed(self) -> set[int]:
        """The layers that were packed again or for the first time."""
        fill = Fill()
        build(self.path, fill)
        return set(fill.added)


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, LAYERS - 1), st.data())
def test_blobs_cut_off_anywhere(whole: bytes, layers: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(folder, layers)
        size = built.blobs.stat().st_size
        end = data.draw(st.integers(0, size))
        os.truncate(built.blobs, end)
        lost = damaged(end, size - end)
        assert built.resumed() == lost | set(range(layers, LAYERS))
        assert built.path.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(st.integers(1, LAYERS - 1), st.integers(0, 7), st.data())
def test_a_bit_of_the_blobs_flipped(
    whole: bytes, layers: int, bit: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(folder, layers)
        at = data.draw(st.integers(0, built.blobs.stat().st_size - 1))
        flip(built.blobs, at, bit)
        assert built.resumed() == damaged(at, 1) | set(range(layers, LAYERS))
        assert built.path.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(st.integers(1, LAYERS - 1), st.data())
def test_a_journal_torn_anywhere(whole: bytes, layers: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(folder, layers)
        text = built.journal.read_bytes()
        end = data.draw(st.integers(0, len(text)))
        os.truncate(built.journal, end)
        # A line that lacks nothing but its end is as good as whole.
        lines = (text[:end] + b"\n").split(b"\n")
        kept = len([line for line in lines if line in text.splitlines()]) - 1
        assert built.resumed() == set(range(max(0, kept), LAYERS))
        assert built.path.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(st.integers(1, LAYERS - 1), st.integers(0, 7), st.data())
def test_a_bit_of_the_journal_flipped(
    whole: bytes, layers: int, bit: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(folder, layers)
        text = built.journal.read_bytes()
        at = data.draw(st.integers(0, len(text) - 1))
        flip(built.journal, at, bit)
        line = text[:at].count(b"\n")
        again = built.resumed() - set(range(layers, LAYERS))
        if line == 0:  # whose blobs these are is not known any more
            assert again == set(range(layers))
        else:
            assert {line - 1} <= again <= {line - 1, line}  # a line's end joins two of them
        assert built.path.read_bytes() == whole


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1 << 16), min_size=1, max_size=4))
def test_torn_again_and_again(whole: bytes, ends: list[int]) -> None:
    """Each process tears the journal somewhere and is stopped one layer later."""
    with tempfile.TemporaryDirectory() as folder:
        built = Built(folder, 2)
        for end in ends:
            os.truncate(built.journal, end % (built.journal.stat().st_size + 1))
            stop_after(built.path, 1)
        built.resumed()
        assert built.path.read_bytes() == whole


KILLED = """
import sys
from pathlib import Path
from tiny_packs import LOG, layer_tensors, tiny_spec
from moestro.cache import open_or_build

spec = tiny_spec(6, 6, 6, 3, 3)

def fill(writer):
    for layer in writer.missing:
        if layer == 2:
            writer._partial.write_blobs(2, 0, memoryview(b"half a layer" * 1000))
            print("in work", flush=True)
            sys.stdin.readline()
        writer.add_layer(layer, layer_tensors(spec, layer))

open_or_build(Path(sys.argv[1]), spec, fill, lambda: None, LOG)
"""


def test_a_killed_process_costs_the_layer_in_work(path: Path, whole: bytes) -> None:
    support = Path(__file__).parents[2] / "support"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        env={**os.environ, "PYTHONPATH": f"{support}:{':'.join(sys.path)}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in work\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    fill = Fill()
    build(path, fill)
    assert fill.added == [2, 3, 4]
    assert path.read_bytes() == whole
    Pack.open(path, SPEC).close()
