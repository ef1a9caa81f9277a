"""Reads that the kernel has under way, handed over and collected without a thread of ours.

Linux' native asynchronous I/O (io_setup, io_submit and io_getevents, man 2 io_submit), called
through ctypes: one call begins all reads of a layer, one collects those that ended. It is
asynchronous for descriptors that read directly (O_DIRECT); others it reads on the spot.
"""

import ctypes
import errno
import os
import platform
from collections.abc import Sequence

_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = range(4)
# The generic numbers are those of every architecture that came to Linux later.
_X86_64 = {_SETUP: 206, _DESTROY: 207, _GETEVENTS: 208, _SUBMIT: 209}
_GENERIC = {_SETUP: 0, _DESTROY: 1, _GETEVENTS: 4, _SUBMIT: 2}
_NUMBERS = {"x86_64": _X86_64, "aarch64": _GENERIC, "riscv64": _GENERIC}
_PREADV = 7
_INTERRUPTED = errno.EINTR


class _Control(ctypes.Structure):
    """`struct iocb` of linux/aio_abi.h, as machines with the lowest byte first have it."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("event_descriptor", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """`struct io_event`"""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


class _Part(ctypes.Structure):
    """`struct iovec`"""

    _fields_ = (("base", ctypes.c_uint64), ("size_bytes", ctypes.c_uint64))


class _Moment(ctypes.Structure):
    """`struct timespec`"""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class ReadQueue:
    """At most `depth` reads under way; for one thread. Places name them: 0 to depth - 1."""

    def __init__(self, depth: int) -> None:
        """Raises OSError where the kernel has no such queue, or has none left."""
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None or platform.system() != "Linux":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._numbers = numbers
        self._context = ctypes.c_ulong(0)
        self.depth = depth
        self.under_way = 0
        self._controls = [_Control() for _ in range(depth)]
        self._pointers = (ctypes.c_void_p * depth)()
        self._events = (_Event * depth)()
        self._parts: list[object] = [None] * depth
        self._ask(_SETUP, ctypes.c_ulong(depth), ctypes.byref(self._context))

    def begin(
        self, descriptor: int, reads: Sequence[tuple[int, int, Sequence[memoryview]]]
    ) -> None:
        """Of each read: its place, which is free, the offset in the file, and what to fill.

        The buffers belong to the kernel until the place is collected. Raises OSError, and then none
        of those that had not begun will; `under_way` says how many did.
        """
        for number, (place, offset_bytes, buffers) in enumerate(reads):
            parts = (_Part * len(buffers))()
            for part, buffer in zip(parts, buffers, strict=True):
                part.base = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
                part.size_bytes = len(buffer)
            self._parts[place] = parts
            control = self._controls[place]
            control.data, control.opcode, control.descriptor = place, _PREADV, descriptor
            control.buffer, control.count = ctypes.addressof(parts), len(buffers)
            control.offset = offset_bytes
            self._pointers[number] = ctypes.addressof(control)
        begun = 0
        while begun < len(reads):
            first = ctypes.addressof(self._pointers) + begun * ctypes.sizeof(ctypes.c_void_p)
            count = ctypes.c_long(len(reads) - begun)
            more = self._ask(_SUBMIT, self._context, count, ctypes.c_void_p(first))
            begun += more
            self.under_way += more

    def ended(self, least: int = 0, most_s: float | None = None) -> list[tuple[int, int]]:
        """(place, bytes read or minus an errno) of those that ended; waits for `least` of them.

        With `most_s` no longer than that. Raises OSError.
        """
        until = None
        if most_s is not None:
            whole = int(most_s)
            until = ctypes.byref(_Moment(whole, int((most_s - whole) * 1e9)))
        bounds = ctypes.c_long(min(least, self.under_way)), ctypes.c_long(self.depth)
        found = self._ask(_GETEVENTS, self._context, *bounds, self._events, until)
        self.under_way -= found
        return [(self._events[at].data, self._events[at].result) for at in range(found)]

    def close(self) -> None:
        """Waits for the reads under way. Idempotent."""
        if self._context.value:
            self._ask(_DESTROY, self._context)
            self._context = ctypes.c_ulong(0)
            self.under_way = 0

    def _ask(self, what: int, *arguments: object) -> int:
        """Raises OSError."""
        while (found := self._call(ctypes.c_long(self._numbers[what]), *arguments)) < 0:
            number = ctypes.get_errno()
            if number != _INTERRUPTED:
                raise OSError(number, os.strerror(number))
        return int(found)
