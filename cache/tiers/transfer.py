"""Moves blobs from the pack into slots. Knows offsets and buffers, no experts and no policy."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Protocol, runtime_checkable

from moestro.cache.facts import PackInvalid, ReadFailed
from moestro.cache.pack import Pack, TensorViews, prove

MOST_BYTES_AT_ONCE = 1 << 20
"""Longer reads gain nothing on the disk, and the first expert would wait for the last."""

Failure = ReadFailed | PackInvalid


@dataclass(frozen=True, slots=True, eq=False)
class ReadRequest:
    """Neighbouring blobs of one layer, read in one go, each into a slot of its own."""

    layer: int
    experts: range
    slots: tuple[int, ...]  # whose they are; only the cache knows what that means
    buffers: tuple[memoryview, ...]  # one stride each; none for slots that only a link can fill
    guessed: bool  # a prefetch: whatever is demanded goes first


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one request. With an error, its buffers hold garbage."""

    request: ReadRequest
    read_s: float
    error: Failure | None = None


class Reader(Protocol):
    """Submits from one thread; completions are collected by the same thread, in any order."""

    def submit(self, requests: Sequence[ReadRequest]) -> None:
        """Queues all at once. Their buffers belong to the reader until they are completed."""

    def poll(self) -> list[Completion]:
        """What was completed since the last call; does not wait."""

    def wait(self) -> list[Completion]:
        """Like `poll`, but with at least one in it. Only while something is under way."""

    def close(self) -> None:
        """Ends reads under way, forgets what is queued. Idempotent."""


class PackReader(Reader, Protocol):
    """A reader that others wait beside."""

    def wait_at_most(self, seconds: float) -> list[Completion]:
        """Like `wait`, but with none in it when `seconds` pass first."""


@runtime_checkable
class LendingReader(Reader, Protocol):
    """A reader whose source lies in memory: experts can be computed with where they are."""

    def resident(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of `experts` that can be lent, in this order."""

    def lend(self, layer: int, experts: Sequence[int], *, alone: bool) -> list[TensorViews]:
        """Their views, valid until `give_back`; not `alone`, if more of the event is submitted."""

    def give_back(self) -> None:
        """Nothing is borrowed any more."""


def read_blobs(pack: Pack, request: ReadRequest) -> None:
    """Reads and, at their first read, checks. Raises ReadFailed, PackInvalid.

    After either, the pack is in doubt.
    """
    try:
        pack.file.read_into(pack.offset(request.layer, request.experts[0]), request.buffers)
    except ReadFailed:
        pack.doubt()
        raise
    prove_blobs(pack, request)


def prove_blobs(pack: Pack, request: ReadRequest) -> None:
    """Checks, at their first read, blobs that were read. Raises PackInvalid; then as above."""
    layer, sums = request.layer, pack.unproved(request.layer)
    try:
        for expert, buffer in zip(request.experts, request.buffers, strict=True):
            if sums[expert] is not None:
                prove(buffer, sums[expert], pack.spec.layers[layer].name, expert)
    except PackInvalid:
        pack.doubt()
        raise


class DirectReader:
    """Reader threads over one pack. Reads with O_DIRECT if the pack's file system grants it."""

    def __init__(self, pack: Pack, threads: int = 1) -> None:
        self._pack = pack
        self._demanded: deque[ReadRequest] = deque()
        self._guessed: deque[ReadRequest] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._broken = False
        self._completed: SimpleQueue[Completion] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"moestro-reader-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[ReadRequest]) -> None:
        with self._changed:
            for request in requests:
                (self._guessed if request.guessed else self._demanded).append(request)
            if self._broken:
                self._give_up()
            self._changed.notify(len(requests))

    def poll(self) -> list[Completion]:
        found: list[Completion] = []
        try:
            while True:
                found.append(self._completed.get_nowait())
        except Empty:
            return found

    def wait(self) -> list[Completion]:
        return [self._completed.get(), *self.poll()]

    def wait_at_most(self, seconds: float) -> list[Completion]:
        try:
            return [self._completed.get(timeout=seconds), *self.poll()]
        except Empty:
            return []

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._demanded.clear()
            self._guessed.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (request := self._next()) is not None:
            completion = None
            started = time.perf_counter()
            try:
                read_blobs(self._pack, request)
                completion = Completion(request, time.perf_counter() - started)
            except (ReadFailed, PackInvalid) as error:
                completion = Completion(request, time.perf_counter() - started, error)
            finally:
                if completion is None:  # a bug: it ends this thread, and nobody may wait for it
                    with self._changed:
                        self._demanded.appendleft(request)
                        self._give_up()
                else:
                    self._completed.put(completion)

    def _give_up(self) -> None:
        """From now on every request fails at once; called with the lock held."""
        self._broken = True
        for request in (*self._demanded, *self._guessed):
            self._completed.put(Completion(request, 0.0, ReadFailed("a reader thread died")))
        self._demanded.clear()
        self._guessed.clear()

    def _next(self) -> ReadRequest | None:
        with self._changed:
            while not self._closed:
                if self._demanded:
                    return self._demanded.popleft()
                if self._guessed:
                    return self._guessed.popleft()
                self._changed.wait()
            return None


def runs_of(experts: Sequence[int], longest: int) -> Iterator[range]:
    """Ascending experts as runs of neighbours, none longer than `longest`."""
    if not experts:
        return
    first = experts[0]
    for one, following in pairwise(experts):
        if following != one + 1 or following - first == longest:
            yield range(first, one + 1)
            first = following
    yield range(first, experts[-1] + 1)
