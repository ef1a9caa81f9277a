"""Reads small experts from the pack through the kernel's queue: no thread is woken for one.

Waking a thread, and taking Python's lock from the one that computes, costs as much as reading
36 KiB. What the queue refuses or leaves undone is read again by the pack's file itself, whose
errors are the same as ever.
"""

import time
from collections import deque
from collections.abc import Sequence

from moestro.cache.facts import PackInvalid, ReadFailed
from moestro.cache.pack import Pack, ReadQueue

from .transfer import Completion, DirectReader, PackReader, ReadRequest, prove_blobs, read_blobs

DISK_READERS = 4
"""Threads that read packs: small reads wait for the disk together, and one waits while another

compares what it has read with its sum.
"""

READS_UNDER_WAY = 32
MOST_GUESSED = 16
"""Under way at once: who is demanded next waits behind them."""
SMALL_BYTES = 256 << 10
"""Of an expert: larger ones are compared with their sums by threads, at their first read."""


def pack_reader(pack: Pack) -> PackReader:
    """The reader that suits the pack, the kernel and the file system."""
    if pack.direct and pack.spec.slot_bytes <= SMALL_BYTES:
        try:
            return QueuedReader(pack, ReadQueue(READS_UNDER_WAY))
        except OSError:
            pass  # a kernel or a container without it: threads read
    return DirectReader(pack, DISK_READERS)


class QueuedReader:
    """A PackReader for one thread; owns the queue."""

    def __init__(self, pack: Pack, queue: ReadQueue) -> None:
        self._pack = pack
        self._queue = queue
        self._demanded: deque[ReadRequest] = deque()
        self._guessed: deque[ReadRequest] = deque()
        self._free = list(range(queue.depth))
        self._reading: dict[int, tuple[ReadRequest, float]] = {}  # by place; since when
        self._completed: list[Completion] = []

    def submit(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            (self._guessed if request.guessed else self._demanded).append(request)
        self._begin()

    def poll(self) -> list[Completion]:
        return self._collect(0, None)

    def wait(self) -> list[Completion]:
        return self._collect(1, None)

    def wait_at_most(self, seconds: float) -> list[Completion]:
        return self._collect(1, seconds)

    def close(self) -> None:
        self._demanded.clear()
        self._guessed.clear()
        self._queue.close()
        self._reading.clear()

    def _collect(self, least: int, most_s: float | None) -> list[Completion]:
        if self._reading:
            least = 0 if self._completed else least
            for place, got in self._queue.ended(least, most_s):
                self._end(place, got)
            self._begin()
        found, self._completed = self._completed, []
        return found

    def _begin(self) -> None:
        """Reads those who wait, as far as the queue has room."""
        now_s, reads = time.perf_counter(), []
        while self._free and (self._demanded or self._guessed):
            if not self._demanded and len(self._reading) >= MOST_GUESSED:
                break  # who is demanded next finds room
            request = (self._demanded or self._guessed).popleft()
            place = self._free.pop()
            self._reading[place] = request, now_s
            reads.append(
                (place, self._pack.offset(request.layer, request.experts[0]), request.buffers)
            )
        if not reads:
            return
        before = self._queue.under_way
        try:
            self._queue.begin(self._pack.file.descriptor, reads)
        except OSError:
            for place, _, _ in reads[self._queue.under_way - before :]:
                self._end(place, 0)

    def _end(self, place: int, got: int) -> None:
        """The read at `place` ended with `got` bytes, or minus an errno."""
        request, since_s = self._reading.pop(place)
        self._free.append(place)
        error = None
        try:
            if got == sum(map(len, request.buffers)):
                prove_blobs(self._pack, request)
            else:
                read_blobs(self._pack, request)
        except (ReadFailed, PackInvalid) as found:
            error = found
        self._completed.append(Completion(request, time.perf_counter() - since_s, error))
