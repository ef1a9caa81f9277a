"""Standard output that nobody reads: what is printed is lost, and nothing else happens."""

import errno
import io
import os
import sys

import pytest

from moestro.server.commands.output import lossy, outlive_readers


def stream_of(descriptor: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), encoding="utf-8")


def test_a_pipe_without_a_reader_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        stream = lossy(stream_of(writer))
        for _ in range(3):
            print("line", file=stream, flush=True)
        stream.close()
    finally:
        os.close(writer)


def test_what_fits_again_is_written_again() -> None:
    full, kept = [True], bytearray()

    def write(_: int, data: bytes | memoryview) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        kept.extend(data)
        return len(data)

    stream = lossy(sys.__stdout__ or sys.stdout, write)
    print("lost", file=stream)
    full[0] = False
    print("kept: \udc80", file=stream)
    assert bytes(kept) == b"kept: \\udc80\n"


def test_a_descriptor_that_was_never_open_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    outlive_readers()
    sys.stdout.write("nowhere\n")
    sys.stdout.close()
    sys.stderr.close()
