"""A GPU's slots and the way into them. Every line that needs CUDA is in this file.

    host slot (pinned) --copy stream, in chunks--> device slot --events--> compute stream

A slot is "ready" when the calling thread has seen its copy's event: what it queues from then on
reads the whole expert. It is "free" when the compute stream has passed the event that was recorded
as its last lease ended: the copy stream waits for it, nobody else does.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from moestro.cache.facts import BlobLayout, DeviceFailed, LinkStats, TierPlan, human_bytes
from moestro.cache.pack import Pack

from .link import CHUNK_BYTES, Copied, Copy, Link
from .slots import Arena, SlotArena, SlotViews
from .wiring import Wiring

STAGING_BYTES = 16 * CHUNK_BYTES
"""To be set aside in the host tier's plan. A power of two: torch pins nothing smaller."""

PIECE_BYTES = 256 << 20
"""Of the host tier, registered in one call: where the system refuses so much at once, or all of
it, what it grants is kept."""

GUESSED_CHUNKS = 2
"""Under way at a time: one crosses while the next is ready. A demanded expert waits for no more."""

_ASK_AGAIN_S = 50e-6
_log = logging.getLogger("moestro.cache")


class Pinning(Enum):
    """What of the host tier the GPU can fetch by itself; the name says so in statistics."""

    WHOLE = "pinned"
    PART = "partly pinned"
    STAGING = "pinned staging"
    NONE = "pageable"


class CudaArena(SlotViews):
    """Slots in one tensor on the GPU."""

    def __init__(
        self,
        slots: int,
        slot_bytes: int,
        kinds: Sequence[Sequence[BlobLayout]],
        device: torch.device,
    ) -> None:
        """Raises torch.OutOfMemoryError when the GPU has not so much left."""
        flat = torch.empty(slots * slot_bytes, dtype=torch.uint8, device=device)
        super().__init__(flat, slot_bytes, kinds)
        self.device = device
        self.free: list[torch.cuda.Event | None] = [None] * slots
        """After it, nothing that was queued reads the slot's old expert."""

    def buffers(self, slots: Sequence[int], sizes: Sequence[int]) -> tuple[memoryview, ...]:
        return ()

    def used(self, slots: Iterable[int]) -> None:
        try:
            event = _event()
            event.record(torch.cuda.current_stream(self.device))
        except torch.AcceleratorError as error:
            raise _failed(self.device, error) from error
        for slot in slots:
            self.free[slot] = event


@dataclass(slots=True, eq=False)
class _Flight:
    """One expert on its way: what is left to be queued, and what of it is under way."""

    copy: Copy
    left: deque[tuple[torch.Tensor, torch.Tensor]]  # chunks of the host slot, of the device slot
    under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)
    """Begin and end of what was queued together, oldest first."""
    busy_s: float = 0.0

    def settle(self) -> bool:
        """Takes note of what has crossed; whether all has."""
        while self.under_way and self.under_way[0][1].query():  # type: ignore[no-untyped-call]
            begin, done = self.under_way.popleft()
            self.busy_s += begin.elapsed_time(done) / 1000
        return not self.left and not self.under_way


class CudaLink:
    """Two copy streams. What is demanded is queued at once; of what is guessed, few chunks at a
    time, and none while anything demanded is under way: a copy engine that has begun with a stream
    goes on with what it finds there, and a demanded expert would wait for all of it.
    """

    def __init__(self, host: SlotArena, device: CudaArena, piece_bytes: int = PIECE_BYTES) -> None:
        """`piece_bytes` of the host tier are registered in one call: a multiple of pages."""
        self._host, self._device = host, device
        self._streams = (_stream(device.device), _stream(device.device))  # demanded, guessed
        for stream in self._streams:  # the slots' memory may have been another tensor's
            stream.wait_stream(torch.cuda.current_stream(device.device))
        self._piece_bytes = piece_bytes
        self._pinned_bytes = _register(host.flat, piece_bytes)
        self._staging: torch.Tensor | None = None
        self.pinning = Pinning.WHOLE
        if self._pinned_bytes < host.flat.numel():
            _forget_error(device.device)
            self._staging = _staging(host.flat.numel(), self._pinned_bytes)
            rest = Pinning.NONE if self._staging is None else Pinning.STAGING
            self.pinning = Pinning.PART if self._pinned_bytes else rest
        self._staged: deque[torch.cuda.Event] = deque()  # of the chunks last staged, oldest first
        self._turn = 0
        self._flights: tuple[list[_Flight], list[_Flight]] = ([], [])  # demanded, guessed
        self._copies = self._chunks = self._bytes = 0
        self._busy_s = 0.0
        self._failure: DeviceFailed | None = None
        """Of the device: from then on there is nothing to wait for."""
        self._closed = False

    def submit(self, copies: Sequence[Copy]) -> None:
        """Raises DeviceFailed, as `poll`, `wait` and `copy_s` do."""
        with self._asking():
            self._submit(copies)

    def poll(self) -> list[Copied]:
        with self._asking():
            return self._poll()

    def wait(self) -> list[Copied]:
        with self._asking():
            while not (ended := self._poll()):
                first = next(x for flights in self._flights for x in flights)
                first.under_way[0][1].synchronize()
            return ended

    @contextmanager
    def _asking(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except torch.AcceleratorError as error:
            self._failure = _failed(self._device.device, error)
            raise self._failure from error

    def _submit(self, copies: Sequence[Copy]) -> None:
        demanded, guessed = self._flights
        guessed += [self._flight(copy) for copy in copies if copy.guessed]
        stream = self._streams[0]
        with torch.cuda.stream(stream):
            for copy in copies:
                if not copy.guessed:
                    flight = self._flight(copy)
                    demanded.append(flight)
                    self._queue(flight, stream, len(flight.left))
        self._guess()

    def _poll(self) -> list[Copied]:
        ended = []
        for flights in self._flights:
            for flight in [flight for flight in flights if flight.settle()]:
                flights.remove(flight)
                self._copies += 1
                self._bytes += flight.copy.size_bytes
                self._busy_s += flight.busy_s
                ended.append(Copied(flight.copy, flight.busy_s))
        self._guess()
        return ended

    def _guess(self) -> None:
        """Queues the next chunks of what is guessed, while nothing demanded is under way."""
        demanded, guessed = self._flights
        if demanded or not guessed:
            return
        room = GUESSED_CHUNKS - sum(len(flight.under_way) for flight in guessed)
        stream = self._streams[1]
        with torch.cuda.stream(stream):
            for flight in guessed:
                while flight.left and room > 0:
                    self._queue(flight, stream, 1)
                    room -= 1

    def due_s(self) -> float:
        return _ASK_AGAIN_S

    def copy_s(self, size_bytes: int) -> float:
        """From copies of the host's first chunk into memory of its own; the first one warms up."""
        with self._asking():
            return self._copy_s(size_bytes)

    def _copy_s(self, size_bytes: int) -> float:
        source = self._host.flat[: min(CHUNK_BYTES, self._host.slot_bytes)]
        target = torch.empty_like(source, device=self._device.device)
        begin, done = _event(timing=True), _event(timing=True)
        stream = self._streams[0]
        stream.wait_stream(torch.cuda.current_stream(self._device.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            done.record(stream)
        done.synchronize()
        taken_s: float = begin.elapsed_time(done) / 1000
        return taken_s * size_bytes / len(source)

    def stats(self) -> LinkStats:
        """Copies of both streams may overlap: `busy_s` counts each by itself."""
        return LinkStats(
            name=f"{self._device.device}, {self.pinning.value}",
            emulated=False,
            copies=self._copies,
            copied_bytes=self._bytes,
            chunks=self._chunks,
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            torch.cuda.synchronize(self._device.device)
        except torch.AcceleratorError as error:  # then nothing reads the host's slots any more
            _log.warning("%s", _failed(self._device.device, error))
        for flights in self._flights:
            flights.clear()
        for start in range(0, self._pinned_bytes, self._piece_bytes):
            _runtime().cudaHostUnregister(self._host.flat.data_ptr() + start)

    def _flight(self, copy: Copy) -> _Flight:
        return _Flight(copy, deque(self._pieces(copy)))

    def _queue(self, flight: _Flight, stream: torch.cuda.Stream, chunks: int) -> None:
        """The next `chunks` of a flight, on `stream`, which is the current one."""
        free = self._device.free[flight.copy.target]
        if free is not None:
            stream.wait_event(free)
        begin, done = _event(timing=True), _event(timing=True)
        begin.record(stream)
        for _ in range(chunks):
            source, target = flight.left.popleft()
            staging = self._staging
            if staging is not None and source.is_pinned():
                staging = None
            if staging is not None:
                source = self._stage(source, staging)
            target.copy_(source, non_blocking=True)
            if staging is not None:
                self._staged.append(_event())
                self._staged[-1].record(stream)
            self._chunks += 1
        done.record(stream)
        flight.under_way.append((begin, done))

    def _pieces(self, copy: Copy) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Chunks of the host slot and of the device slot, uint8; none lies in two pieces."""
        here, there = copy.source * self._host.slot_bytes, copy.target * self._device.slot_bytes
        at = 0
        while at < copy.size_bytes:
            piece_end = ((here + at) // self._piece_bytes + 1) * self._piece_bytes - here
            end = min(at + CHUNK_BYTES, copy.size_bytes, piece_end)
            yield (
                self._host.flat[here + at : here + end],
                self._device.flat[there + at : there + end],
            )
            at = end

    def _stage(self, source: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
        """`source` in pinned memory; waits while all of that is on its way."""
        places = len(staging)
        if len(self._staged) == places:
            self._staged.popleft().synchronize()
        staged = staging[self._turn % places, : len(source)]
        self._turn += 1
        staged.copy_(source)
        return staged


def cuda(device: torch.device, pack: Pack, plan: TierPlan) -> Wiring:
    """To slots on `device`. The host's plan should set STAGING_BYTES aside."""

    def wire(host: SlotArena) -> tuple[Arena, Link]:
        assert plan.device is not None
        kinds = [layer.kinds for layer in pack.spec.layers]
        arena = CudaArena(plan.device.slots, plan.device.slot_bytes, kinds, device)
        return arena, CudaLink(host, arena)

    return wire


def _register(flat: torch.Tensor, piece_bytes: int) -> int:
    """Pins memory piece by piece, until one is refused; how many bytes of it, from the first.

    Registered, not allocated by torch, whose pinned blocks are powers of two: a budget of 33 GiB
    would take 64.
    """
    size_bytes = flat.numel()
    for start in range(0, size_bytes, piece_bytes):
        length = min(piece_bytes, size_bytes - start)
        if int(_runtime().cudaHostRegister(flat.data_ptr() + start, length, 0)):
            return start
        assert flat[start : start + 1].is_pinned(), "registered memory is pinned"
    return size_bytes


def _staging(size_bytes: int, pinned_bytes: int) -> torch.Tensor | None:
    """[places, CHUNK_BYTES] for what of the host tier was refused; None where that is, too."""
    refused = (
        f"CUDA pinned {human_bytes(pinned_bytes)} of the host tier's {human_bytes(size_bytes)}"
        " and refused to pin more"
    )
    advice = "lower --host-memory or raise the limit of locked memory"
    try:
        staging = torch.empty(
            (STAGING_BYTES // CHUNK_BYTES, CHUNK_BYTES), dtype=torch.uint8, pin_memory=True
        )
    except RuntimeError as error:
        _log.warning(
            "%s, and a staging pool, too: the other experts cross from pageable memory, several"
            " times slower (%s); %s",
            refused,
            error,
            advice,
        )
        return None
    assert staging.is_pinned(), "torch pinned the staging pool"
    _log.warning(
        "%s: the other experts cross through a pinned pool of %s, which costs the computing thread"
        " a copy of each; %s",
        refused,
        human_bytes(STAGING_BYTES),
        advice,
    )
    return staging


def _failed(device: torch.device, error: torch.AcceleratorError) -> DeviceFailed:
    first_line = str(error).partition("\n")[0]
    return DeviceFailed(f"{device} failed: {first_line}; start again, and see the driver's log")


def _event(*, timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the error of a refused call and reports it to the next kernel: let it be this."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return
