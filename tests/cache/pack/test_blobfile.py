import errno
import os
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
