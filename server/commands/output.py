"""Standard output and error that may be lost at any time: a closed pipe, a full disk.

A server must not end because nobody reads what it prints.
"""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

Write = Callable[[int, bytes | memoryview], int]


class _LossyFile(io.RawIOBase):
    """Writes to a file descriptor; what cannot be written is dropped."""

    def __init__(self, descriptor: int, write: Write) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._write = write

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data) -> int:  # type: ignore[no-untyped-def]  # any buffer
        whole = memoryview(data).cast("B")
        try:
            return self._write(self._descriptor, whole)
        except OSError:  # a pipe without a reader, a full disk, a terminal that is gone
            return len(whole)


def lossy(stream: TextIO, write: Write = os.write) -> TextIO:
    """A stream to the same place whose writes and flushes never fail."""
    raw = _LossyFile(stream.fileno(), write)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def outlive_readers() -> None:
    """From now on nothing that is printed can end the process."""
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO | None) -> TextIO:
    """None is what Python makes of a descriptor that was closed from the start."""
    return Path(os.devnull).open("w") if stream is None else lossy(stream)
