import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import ReadFailed
from moestro.cache.pack.blobfile import BlobFile, _after, page_memory

PAGE = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "blobs"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(8)))
    return path


def buffers(*pages: int) -> list[memoryview]:
    return [memoryview(page_memory(count * PAGE)) for count in pages]


@pytest.mark.parametrize("direct", [True, False])
def test_one_read_fills_several_buffers(path: Path, direct: bool) -> None:
    file = BlobFile(path, direct=direct)
    into = buffers(1, 2, 1)
    file.read_into(2 * PAGE, into)
    assert b"".join(into) == path.read_bytes()[2 * PAGE : 6 * PAGE]
    file.close()
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_reading_past_the_end_fails(path: Path, direct: bool) -> None:
    file = BlobFile(path, direct=direct)
    with pytest.raises(ReadFailed, match="ends early"):
        file.read_into(7 * PAGE, buffers(2))
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_that_stops_short_is_continued(
    path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv

    def short(fd: int, into: list[memoryview], offset: int) -> int:
        return whole(fd, [into[0][: PAGE + 512]], offset)

    file = BlobFile(path, direct=direct)
    into = buffers(3, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", short)
        file.read_into(0, into)
    assert b"".join(into) == path.read_bytes()[: 5 * PAGE]
    file.close()


def test_a_refused_read_names_file_and_place(path: Path) -> None:
    file = BlobFile(path)
    os.close(file._fd)
    with pytest.raises(ReadFailed, match="blobs at 4096: Bad file descriptor"):
        file.read_into(PAGE, buffers(1))
    file._fd = -1


@pytest.mark.parametrize("refusing", ["open", "preadv"])
def test_where_direct_reads_are_refused_it_reads_buffered(
    path: Path, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"open": os.open, "preadv": os.preadv}
    granted = kind[refusing]

    def refuse(*args: object) -> object:
        if refusing == "preadv" or (isinstance(args[1], int) and args[1] & os.O_DIRECT):
            raise OSError(errno.EINVAL, "Invalid argument")
        return granted(*args)  # type: ignore[operator]

    with monkeypatch.context() as patched:
        patched.setattr(os, refusing, refuse)
        file = BlobFile(path)
    assert not file.direct
    into = buffers(1)
    file.read_into(3 * PAGE, into)
    assert bytes(into[0]) == b"\x03" * PAGE
    file.close()


class Refusing:
    """preadv of a file system that granted O_DIRECT: some direct reads fail, or stay short."""

    def __init__(self, granted: int, most_bytes: int, short_bytes: int | None = None) -> None:
        self.left, self.most_bytes, self.short_bytes = granted, most_bytes, short_bytes
        self.refused = 0
        self._whole = os.preadv

    def __call__(self, fd: int, into: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            self.left -= 1
            if self.left < 0 or sum(map(len, into)) > self.most_bytes:
                self.refused += 1
                if self.short_bytes is None:
                    raise OSError(errno.EINVAL, "Invalid argument")
                return self._whole(fd, into, offset) and self.short_bytes
        return self._whole(fd, into, offset)


@pytest.mark.parametrize(
    "refusing",
    [
        Refusing(granted=99, most_bytes=PAGE),  # the first page is read, larger ones are not
        Refusing(granted=3, most_bytes=99 * PAGE),  # good for a while
        Refusing(granted=2, most_bytes=99 * PAGE, short_bytes=512),
    ],
)
def test_direct_reads_that_are_refused_later_are_made_buffered(
    path: Path,
    refusing: Refusing,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(os, "preadv", refusing)
    file = BlobFile(path)
    for start in (1, 4, 2):
        into = buffers(1, 2)
        file.read_into(start * PAGE, into)
        assert b"".join(into) == path.read_bytes()[start * PAGE : (start + 3) * PAGE]
    assert not file.direct
    assert (refusing.refused, len(caplog.records)) == (1, 1), "asked again, or said twice"
    file.close()


def test_all_threads_change_to_buffered_reads_and_it_is_said_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both, whole, calls = threading.Barrier(2, timeout=10), os.preadv, count()

    def together(fd: int, into: list[memoryview], offset: int) -> int:
        if next(calls) < 2:
            both.wait()
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(fd, into, offset)

    file = BlobFile(path)
    monkeypatch.setattr(os, "preadv", together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda start: file.read_into(start * PAGE, buffers(1, 1)), (0, 4)))
    assert not file.direct
    assert len(caplog.records) == 1
    file.close()


def test_a_missing_file_is_the_caller_s_business(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlobFile(tmp_path / "nothing")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_the_rest_of_the_buffers_begins_where_reading_stopped(
    sizes: list[int], data: st.DataObject
) -> None:
    skip = data.draw(st.integers(0, sum(sizes)))
    text = bytes(range(sum(sizes)))
    parts, at = [], 0
    for size in sizes:
        parts.append(memoryview(text)[at : at + size])
        at += size
    assert b"".join(_after(parts, skip)) == text[skip:]
