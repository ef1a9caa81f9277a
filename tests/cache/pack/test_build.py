import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moestro.cache import (
    NoDiskSpace,
    Pack,
    PackSpec,
    PackUnwritable,
    PackWriter,
    ReadFailed,
    open_or_build,
)
from tiny_packs import LOG, build_tiny, fill_tiny, layer_tensors, tiny_spec


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "made.pack"


def never() -> None:
    raise AssertionError("nobody else builds")


class CountedFill:
    def __init__(self, spec: PackSpec) -> None:
        self.spec = spec
        self.calls = 0

    def __call__(self, writer: PackWriter) -> None:
        self.calls += 1
        fill_tiny(self.spec, writer)


def files(folder: Path) -> set[str]:
    return {found.name for found in folder.iterdir()}


def test_it_is_built_once_and_then_opened(
    path: Path, spec: PackSpec, caplog: pytest.LogCaptureFixture
) -> None:
    fill = CountedFill(spec)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            open_or_build(path, spec, fill, never, LOG).close()
    assert fill.calls == 1
    assert files(path.parent) == {"made.pack", "made.pack.lock"}
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert "18 experts" in caplog.text


def test_a_pack_that_cannot_be_read_now_is_not_built_again(
    path: Path, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors or memory are short, or every read is refused: the pack itself may be good."""
    fill = CountedFill(spec)
    open_or_build(path, spec, fill, never, LOG).close()
    for number in (errno.EMFILE, errno.ENOMEM, errno.EINVAL):
        for name in ("open", "preadv"):

            def refuse(*_: object, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patched, pytest.raises(ReadFailed, match="made.pack"):
                patched.setattr(os, name, refuse)
                open_or_build(path, spec, fill, never, LOG)
    open_or_build(path, spec, fill, never, LOG).close()
    assert fill.calls == 1


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_bytes(b"other data" * 1000), "foreign"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"), "corrupt"),
        (lambda path: build_tiny(path, tiny_spec(6, 6, 6, model="old")).close(), "another model"),
    ],
)
def test_what_cannot_be_used_is_built_again_with_one_warning(
    path: Path,
    spec: PackSpec,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    why: str,
) -> None:
    fill = CountedFill(spec)
    open_or_build(path, spec, fill, never, LOG).close()
    damage(path)
    caplog.clear()
    open_or_build(path, spec, fill, never, LOG).close()
    assert fill.calls == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert why in warnings[0]
    Pack.open(path, spec).close()


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("error", [ValueError("bad weights"), Interrupted(), OSError(5, "I/O")])
def test_a_build_that_fails_before_its_first_layer_leaves_nothing(
    path: Path, spec: PackSpec, error: BaseException
) -> None:
    def fill(writer: PackWriter) -> None:
        assert path.with_suffix(".partial").exists()
        raise error

    with pytest.raises(type(error)) as caught:
        open_or_build(path, spec, fill, never, LOG)
    assert caught.value is error
    assert files(path.parent) == {"made.pack.lock"}
    build_tiny(path, spec).close()


def test_a_failed_rebuild_keeps_what_was_there(path: Path, spec: PackSpec) -> None:
    build_tiny(path, spec).close()

    def fill(writer: PackWriter) -> None:
        raise ValueError

    with pytest.raises(ValueError):
        open_or_build(path, tiny_spec(3), fill, never, LOG)
    Pack.open(path, spec).close()


def test_what_is_no_partial_is_swept(path: Path, spec: PackSpec) -> None:
    path.parent.mkdir()
    path.with_suffix(".partial").write_bytes(b"half")
    build_tiny(path, spec).close()
    assert files(path.parent) == {"made.pack", "made.pack.lock"}


def test_free_space_is_checked_before_anything_is_written(path: Path, spec: PackSpec) -> None:
    asked = []

    def little(folder: Path) -> int:
        asked.append(folder)
        return 10_000

    with pytest.raises(NoDiskSpace) as caught:
        open_or_build(path, spec, CountedFill(spec), never, LOG, free_bytes=little)
    assert str(caught.value) == (
        f"the expert pack needs 100 KiB in {path.parent}, where 9.8 KiB are free"
    )
    assert asked == [path.parent]
    assert files(path.parent) == {"made.pack.lock"}


@pytest.fixture
def full_disk() -> Iterator[int]:
    fd = os.open("/dev/full", os.O_WRONLY)
    yield fd
    os.close(fd)


def test_a_disk_that_fills_up_is_named(full_disk: int, path: Path, spec: PackSpec) -> None:
    class Full(CountedFill):
        def __call__(self, writer: PackWriter) -> None:
            writer.add_layer(0, layer_tensors(spec, 0))
            os.dup2(full_disk, writer._partial._blobs_fd)
            writer.add_layer(1, layer_tensors(spec, 1))

    with pytest.raises(NoDiskSpace, match="filled up while"):
        open_or_build(path, spec, Full(spec), never, LOG)
    assert files(path.parent) == {"made.pack.lock"}


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, spec: PackSpec) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PackUnwritable, match=r"made\.pack"):
        build_tiny(tmp_path / "file" / "made.pack", spec)


def test_layers_come_in_order_and_complete(path: Path, spec: PackSpec) -> None:
    def backwards(writer: PackWriter) -> None:
        writer.add_layer(1, layer_tensors(spec, 1))

    def one_only(writer: PackWriter) -> None:
        writer.add_layer(0, layer_tensors(spec, 0))

    with pytest.raises(ValueError, match=r"layer 1 added; missing, in this order: \[0, 1, 2\]"):
        open_or_build(path, spec, backwards, never, LOG)
    with pytest.raises(ValueError, match="1 of 3 layers"):
        open_or_build(path, spec, one_only, never, LOG)
    assert not path.exists()


def test_tensors_must_be_those_of_the_spec(path: Path, spec: PackSpec) -> None:
    def fill(writer: PackWriter) -> None:
        tensors = layer_tensors(spec, 0)
        writer.add_layer(0, tensors | {"up": tensors["up"].double()})

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*float64"):
        open_or_build(path, spec, fill, never, LOG)


def test_strided_tensors_are_packed_as_they_read(path: Path) -> None:
    spec = tiny_spec(4)

    def fill(writer: PackWriter) -> None:
        tensors = layer_tensors(spec, 0)
        up = tensors["up"].transpose(1, 2).contiguous().transpose(1, 2)
        writer.add_layer(0, tensors | {"up": up})

    open_or_build(path, spec, fill, never, LOG).close()
    plain = path.with_name("plain.pack")
    build_tiny(plain, spec).close()
    assert path.read_bytes() == plain.read_bytes()


def test_a_layer_larger_than_the_write_buffer(tmp_path: Path) -> None:
    spec = tiny_spec(1, 1, 1200)  # 9.6 MB in the last layer, also more than one check reads
    pack = build_tiny(tmp_path / "long.pack", spec)
    assert pack.unproved(2)[1199] is None
    pack.close()


def hold(path: Path) -> int:
    path.parent.mkdir(exist_ok=True)
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_waiting_can_be_given_up(path: Path, spec: PackSpec) -> None:
    class Cancelled(Exception):
        pass

    def cancel() -> None:
        raise Cancelled

    fd = hold(path)
    with pytest.raises(Cancelled):
        open_or_build(path, spec, CountedFill(spec), cancel, LOG)
    os.close(fd)
    build_tiny(path, spec).close()


def test_a_valid_pack_needs_no_lock(path: Path, spec: PackSpec) -> None:
    build_tiny(path, spec).close()
    fd = hold(path)
    open_or_build(path, spec, CountedFill(spec), never, LOG).close()
    os.close(fd)


START = """
import sys
from pathlib import Path
from tiny_packs import LOG, fill_tiny, tiny_spec
from moestro.cache import open_or_build

spec = tiny_spec(6, 6, 6)

def say(word):
    sys.stdout.write(word + "\\n")
    sys.stdout.flush()

def fill(writer):
    say("building")
    sys.stdin.readline()
    fill_tiny(spec, writer)

open_or_build(Path(sys.argv[1]), spec, fill, lambda: say("waiting"), LOG).close()
say("open")
"""


def start(path: Path) -> "subprocess.Popen[str]":
    support = Path(__file__).parents[2] / "support"
    return subprocess.Popen(
        [sys.executable, "-c", START, str(path)],
        env={**os.environ, "PYTHONPATH": f"{support}:{':'.join(sys.path)}", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_starts_share_one_build(path: Path, spec: PackSpec) -> None:
    with start(path) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "building\n"
        with start(path) as two:
            assert two.stdout is not None
            assert two.stdout.readline() == "waiting\n"
            ends = [one.communicate("\n")[0], two.communicate()[0]]
    assert ends[0] == "open\n"
    assert ends[1].split()[-1] == "open"
    assert "building" not in ends[1]
    assert one.returncode == two.returncode == 0
    Pack.open(path, spec).close()


def no_locks(fd: int, how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def lying(fd: int, how: int) -> None:
    """Everybody gets it."""


@pytest.mark.parametrize("flock", [no_locks, lying])
def test_where_there_are_no_locks_two_starts_both_end_well(
    flock: Callable[[int, int], None],
    path: Path,
    spec: PackSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second begins while the first is between two layers, and is done before it."""
    build_tiny(path.with_name("plain.pack"), spec).close()
    monkeypatch.setattr(fcntl, "flock", flock)
    second = CountedFill(spec)

    def first(writer: PackWriter) -> None:
        for layer in writer.missing:
            writer.add_layer(layer, layer_tensors(spec, layer))
            if layer == 1:
                path.unlink(missing_ok=True)
                open_or_build(path, spec, second, never, LOG).close()

    open_or_build(path, spec, first, never, LOG).close()
    assert second.calls == 1
    assert path.read_bytes() == path.with_name("plain.pack").read_bytes()
    assert files(path.parent) == {"made.pack", "made.pack.lock", "plain.pack", "plain.pack.lock"}
    said = [r.getMessage() for r in caplog.records if r.levelno > logging.INFO]
    assert len(said) == 2, "one for each start"
    assert all("has no locks" in line for line in said)


def test_a_build_without_locks_that_is_stopped_leaves_nothing(
    path: Path, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(writer: PackWriter) -> None:
        writer.add_layer(0, layer_tensors(spec, 0))
        raise InterruptedError

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InterruptedError):
        open_or_build(path, spec, stop, never, LOG)
    assert files(path.parent) == {"made.pack.lock"}
