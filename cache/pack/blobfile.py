"""One open file, read past the page cache into memory that starts at pages.

Bytes that the operating system caches on its own account are memory nobody planned: so reads are
O_DIRECT where the file system grants it, else buffered and forgotten at once (DONTNEED). Some
grant it and refuse a later read, of another size or after a while: from then on all are buffered.
"""

import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from moestro.cache.facts import PAGE_BYTES, ReadFailed

from .huge_pages import ask_for_huge_pages, free_huge_bytes

_log = logging.getLogger("moestro.cache")

_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_MOST_BUFFERS = 1024  # Linux takes no more in one preadv


def page_memory(size_bytes: int) -> mmap.mmap:
    """Zeroed private memory at a page boundary, taking room only where it is touched."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child that shared these pages copy-on-write could divert a direct read in flight.
    memory.madvise(mmap.MADV_DONTFORK)
    return memory


def stream_memory(size_bytes: int) -> mmap.mmap:
    """The same, in huge pages where those are free: for what is read over and over."""
    memory = page_memory(size_bytes)
    ask_for_huge_pages(memory, free_huge_bytes())
    return memory


def huge_memory(size_bytes: int) -> mmap.mmap | None:
    """The same; None where it would be no better than other memory."""
    memory = page_memory(size_bytes)
    return memory if ask_for_huge_pages(memory, free_huge_bytes()) else None


class BlobFile:
    """Read-only; `read_into` may be called from several threads at once."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        """Raises OSError when the file cannot be opened. `direct=False` insists on buffered."""
        self.path = path
        self._fd = _open_direct(path) if direct else -1
        self.direct = self._fd >= 0
        if not self.direct:
            self._fd = os.open(path, os.O_RDONLY)
        self.size_bytes = os.fstat(self._fd).st_size
        self._turning = threading.Lock()  # readers of several threads may be refused at once

    @property
    def descriptor(self) -> int:
        """Of the open file, for who reads it through a queue of the kernel's."""
        return self._fd

    def read_into(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Fills all buffers, in order, from `offset_bytes` on.

        Offset, buffer addresses and buffer sizes are multiples of a page. Raises ReadFailed.
        """
        total, done = sum(map(len, buffers)), 0
        while done < total:
            direct, here = self.direct, offset_bytes + done
            try:
                got = os.preadv(self._fd, _after(buffers, done), here)
            except OSError as error:
                if direct and error.errno in _NOT_DIRECT:
                    self._turn_buffered(error.strerror)
                    continue
                raise ReadFailed(f"reading {self.path} at {here}: {error.strerror}") from error
            reached = done + got
            if direct and reached < total:
                reached -= reached % PAGE_BYTES  # the next direct read must start at a page
            if reached > done:
                done = reached
            elif direct and here + got < self.size_bytes:
                self._turn_buffered("less than a page at a time")
            else:
                raise ReadFailed(f"{self.path} ends early, at {here + got}")
        if not self.direct:
            os.posix_fadvise(self._fd, offset_bytes, total, os.POSIX_FADV_DONTNEED)

    def _turn_buffered(self, why: str | None) -> None:
        """For all threads, and said once. Direct reads under way are not disturbed."""
        with self._turning:
            if not self.direct:
                return
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self.direct = False
        _log.warning(
            "%s is read buffered from now on: a direct read was refused: %s", self.path, why
        )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_direct(path: Path) -> int:
    """A descriptor that has proved it can read directly, or -1."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in _NOT_DIRECT:
            return -1
        raise
    try:
        # Some file systems grant the flag and refuse the first read.
        os.preadv(fd, [page_memory(PAGE_BYTES)], 0)
    except OSError as error:
        os.close(fd)
        if error.errno in _NOT_DIRECT:
            return -1
        raise
    return fd


def _after(buffers: Sequence[memoryview], skip_bytes: int) -> list[memoryview]:
    """What is left to fill when the first `skip_bytes` are."""
    rest = []
    for buffer in buffers:
        if skip_bytes < len(buffer):
            rest.append(buffer[skip_bytes:] if skip_bytes else buffer)
            if len(rest) == _MOST_BUFFERS:
                break
        skip_bytes = max(0, skip_bytes - len(buffer))
    return rest
