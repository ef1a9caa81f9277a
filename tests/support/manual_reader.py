"""A reader without threads: reads end when, in the order, and with the result the test says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moestro.cache import Completion, ExpertCache, Pack, ReadFailed, ReadRequest

GARBAGE = b"\xee"


class ManualReader:
    """Until a read ends, its buffers are garbage: whoever looks too early is found out.

    `holds` is the truth about the bytes: which (layer, expert) each slot's memory holds.
    """

    def __init__(
        self,
        pack: Pack,
        choose: Callable[[int], int] = lambda count: 0,
        sleep: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`choose(n)` picks which of n queued reads ends when the cache has to wait."""
        self._pack = pack
        self._choose = choose
        self._sleep = sleep
        self._completed: list[Completion] = []
        self.queued: list[ReadRequest] = []
        self.submissions: list[list[ReadRequest]] = []
        self.holds: dict[int, tuple[int, int]] = {}
        self.failures: list[ReadFailed] = []  # used up, one a read, before any read succeeds
        self.waits = 0
        self.closed = False

    def submit(self, requests: Sequence[ReadRequest]) -> None:
        self.submissions.append(list(requests))
        for request in requests:
            self._spoil(request)
            self.queued.append(request)

    def poll(self) -> list[Completion]:
        completed, self._completed = self._completed, []
        return completed

    def wait(self) -> list[Completion]:
        if not self._completed:
            self.waits += 1
            self.finish(self._choose(len(self.queued)))
        return self.poll()

    def wait_at_most(self, seconds: float) -> list[Completion]:
        """Whether a read ends meanwhile is the test's choice: none does by itself."""
        self._sleep(seconds)
        return self.poll()

    def close(self) -> None:
        self.closed = True

    def finish(self, index: int = 0) -> None:
        """Ends one queued read, by position."""
        request = self.queued.pop(index)
        if self.failures:
            self._spoil(request)
            self._completed.append(Completion(request, 0.25, self.failures.pop(0)))
            return
        start = self._pack.offset(request.layer, request.experts[0])
        self._pack.file.read_into(start, request.buffers)
        for expert, slot in zip(request.experts, request.slots, strict=True):
            self.holds[slot] = (request.layer, expert)
        self._completed.append(Completion(request, 0.25))

    def finish_all(self) -> None:
        while self.queued:
            self.finish()

    def _spoil(self, request: ReadRequest) -> None:
        for slot, buffer in zip(request.slots, request.buffers, strict=True):
            self.holds.pop(slot, None)
            buffer[:] = GARBAGE * len(buffer)


@dataclass
class Bench:
    """A cache and the strings it hangs on."""

    cache: ExpertCache
    reader: ManualReader
