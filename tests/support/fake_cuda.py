"""A GPU that is only imagined, behind the names of torch.cuda: what CUDA promises, and no more.

Device memory is CPU memory that only this file's operations may touch. Whatever is queued is
judged at once by a race detector (vector_clocks.py), and done in virtual time (virtual_device.py):
a host that reads too early sees old bytes. `fake_cuda_torch.py` puts it in place of torch.cuda.

Modelled
* Streams, events, waits between them, and what makes the host wait: each orders what it orders in
  CUDA, nothing else does. Streams do not wait for the default one (torch makes them so).
* Copies: from and to page-locked memory by a copy engine, one for each direction; from pageable
  memory the call returns when the bytes were taken, to pageable memory when they have arrived.
* Page-locking: cudaHostRegister with error codes, limits for one piece and for all; torch's pinned
  memory. A copy that leaves the piece it begins in is refused.
* Errors: a refused call's is reported once more by the next kernel launch; one that sticks is
  reported by every later call. Memory runs out.
* Kernels: torch's own operations on device tensors compute at once what they would find in the
  order of their stream; `kernel` queues one that looks at the bytes when its time has come.
Not modelled
* Memory is never given back to the device: nothing frees, nothing reuses a freed block.
* One device. No graphs, no managed or mapped memory, no peer copies, no priorities.
* The host's threads are one actor; what they write past torch is told with `host_wrote`.
* Strided views count as all bytes from their first to their last, and may hold unwritten ones.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fake_cuda_facts import Code, Gpu
from fake_cuda_memory import Memory, Place, Region, Span
from vector_clocks import Access, Clock, join
from virtual_device import Engine, Operation, Queue, Timeline

_HOST = 0


class Seen:
    """Whether what torch does is the program's, or the fake's own."""

    own = False

    @contextmanager
    def not_(self) -> Iterator[None]:
        before, self.own = self.own, True
        try:
            yield
        finally:
            self.own = before


class FakeCuda:
    """The device and its driver. Raises Race, Unwritten where the code under test is at fault."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self.gpu = Gpu() if gpu is None else gpu
        self.device = torch.device("cuda", 0)
        self.timeline = Timeline()
        self.seen = Seen()
        self.to_device, self.to_host = Engine("to device"), Engine("to host")
        self.used_bytes = 0
        self.calls = 0
        self.stuck: Code | None = None
        """Every call reports it, from now on."""
        self.found: AssertionError | None = None
        """The first fault of the program: every later call raises it again, so that nobody who
        cleans up after it waits for what was never queued."""
        self._sticks_in: int | None = None
        self._refused: Code | None = None
        self.memory = Memory()
        self._clock: Clock = {_HOST: 0}
        self._streams: list[Stream] = []
        self.default = Stream(self)
        self.current = self.default

    # What a test asks for.

    def stick_in(self, calls: int, code: Code = Code.ILLEGAL_ADDRESS) -> None:
        """So many more calls succeed; then the device is lost."""
        self._sticks_in = self.calls + calls

    def kernel(
        self,
        name: str,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        *,
        duration_s: float | None = None,
        run: Callable[[], None] | None = None,
    ) -> Operation:
        """Queues one on the current stream; `run` happens when it ends, and may look at bytes."""

        def land() -> None:
            with self.seen.not_(), self._noted():
                run()  # type: ignore[misc]

        taken_s = self.gpu.kernel_s if duration_s is None else duration_s
        spans = self.memory.spans(reads), self.memory.spans(writes)
        return self._launch(name, *spans, taken_s, None if run is None else land)

    def sleep(self, seconds: float) -> None:
        """Of a host that waits for something else."""
        if self.found is not None:
            raise self.found
        self.timeline.turn(seconds)

    def host_wrote(self, memory: memoryview, name: str, *, garbage: bool = False) -> None:
        """Into memory that CUDA may know; `garbage`: what nobody may read until the next time."""
        spans = self.memory.spans([torch.frombuffer(memory, dtype=torch.uint8)])
        self.host_touches(name, (), spans, garbage=garbage)

    def region(self, tensor: torch.Tensor) -> Region | None:
        """What its first byte lies in."""
        return self.memory.at(tensor.data_ptr())

    def on_device(self, tensor: torch.Tensor) -> bool:
        found = self.region(tensor)
        return found is not None and found.place is Place.DEVICE

    # What torch.cuda and the driver do.

    def call(self) -> None:
        """The host has called the driver. Raises what sticks."""
        if self.found is not None:
            raise self.found
        self.calls += 1
        if self._sticks_in is not None and self.calls > self._sticks_in:
            self.stuck = Code.ILLEGAL_ADDRESS
        if self.stuck is not None:
            raise self.stuck.error
        self.timeline.turn(self.gpu.call_s)

    def synchronize(self, device: object = None) -> None:
        for stream in self._streams:
            stream.synchronize()

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        self.call()
        return self.gpu.memory_bytes - self.used_bytes, self.gpu.memory_bytes

    def register(self, pointer: int, size_bytes: int, flags: int) -> Code:
        """cudaHostRegister. What the memory holds by then counts as written."""
        try:
            self.call()
        except torch.AcceleratorError:
            assert self.stuck is not None
            return self.stuck
        known = self.memory.all(Place.REGISTERED)
        if any(x.base < pointer + size_bytes and pointer < x.base + x.size_bytes for x in known):
            return self._refuse(Code.ALREADY_REGISTERED)
        so_far = self.memory.size_bytes(Place.REGISTERED)
        too_much = so_far + size_bytes > self.gpu.register_all_bytes
        if too_much or size_bytes > self.gpu.register_bytes:
            return self._refuse(Code.OUT_OF_MEMORY)
        written = self._as_host("what was there when it was registered")
        self.memory.add(pointer, size_bytes, Place.REGISTERED, written)
        return Code.SUCCESS

    def unregister(self, pointer: int) -> Code:
        """cudaHostUnregister; waits for nothing: what still reads it is a race."""
        try:
            self.call()
        except torch.AcceleratorError:
            assert self.stuck is not None
            return self.stuck
        found = self.memory.at(pointer)
        if found is None or found.base != pointer or found.place is not Place.REGISTERED:
            return self._refuse(Code.NOT_REGISTERED)
        self.host_touches("cudaHostUnregister", (), [Span(found, 0, found.size_bytes)])
        self.memory.remove(found)
        return Code.SUCCESS

    @property
    def registered(self) -> list[tuple[int, int]]:
        """Address and size of every piece."""
        return [(x.base, x.size_bytes) for x in self.memory.all(Place.REGISTERED)]

    def allocated(self, tensor: torch.Tensor, written: Access | None = None) -> None:
        """`tensor`'s memory is the device's, from now on. Raises torch.OutOfMemoryError."""
        free_bytes = self.gpu.memory_bytes - self.used_bytes
        if tensor.nbytes > free_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {tensor.nbytes}, {free_bytes} free."
            )
        self.used_bytes += tensor.nbytes
        self.memory.hold(tensor, Place.DEVICE, written)

    def pinned(self, tensor: torch.Tensor) -> None:
        """`tensor`'s memory is page-locked, from now on. Raises torch.AcceleratorError."""
        self.call()
        if self.memory.size_bytes(Place.PINNED) + tensor.nbytes > self.gpu.pinned_bytes:
            raise Code.OUT_OF_MEMORY.error
        self.memory.hold(tensor, Place.PINNED, None)

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, blocks: bool) -> None:
        """Tensor.copy_ across, bytes as they are, on the current stream."""
        self.call()
        inward = self.on_device(target)
        near = source if inward else target  # on the host
        locked = self._locked(near)
        name = f"copy {self.timeline.now_s * 1e6:.0f} us, {'in' if inward else 'out'}"
        if inward and not locked:
            source = source.clone()  # its bytes are taken before the call returns
        reads, writes = self.memory.spans([source]), self.memory.spans([target])
        engine = self.to_device if inward else self.to_host
        to, at, size_bytes = target.data_ptr(), source.data_ptr(), target.nbytes

        def land(held: object = (target, source)) -> None:
            ctypes.memmove(to, at, size_bytes)

        taken_s = size_bytes / self.gpu.copy_bytes_per_s
        operation = self._queue(name, reads, writes, taken_s, land, engine)
        if blocks or not (inward or locked):
            self.host_waits(operation, self.current.clock)
        elif inward and not locked:
            self.timeline.turn(taken_s)

    def compute(
        self, name: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor]
    ) -> Access:
        """One of torch's own kernels, whose bytes the caller moves when this returns."""
        spans = self.memory.spans(reads), self.memory.spans(writes)
        operation = self._launch(name, *spans, self.gpu.kernel_s, None)
        self.timeline.move_up_to(operation)
        return Access(self.current.actor, self.current.clock[self.current.actor], name)

    def host_touches(
        self, name: str, reads: Iterable[Span], writes: Iterable[Span], *, garbage: bool = False
    ) -> None:
        access = self._as_host(name)
        with self._noted():
            for span in reads:
                span.region.shadow.read(span.start, span.end, access, self._clock)
            for span in writes:
                shadow = span.region.shadow
                shadow.write(span.start, span.end, access, self._clock, garbage=garbage)

    def host_uses(
        self, name: str, reads: Iterable[torch.Tensor], writes: Iterable[torch.Tensor]
    ) -> None:
        self.host_touches(name, self.memory.spans(reads), self.memory.spans(writes))

    def host_waits(self, operation: Operation, clock: Clock) -> None:
        self.timeline.wait_for(operation)
        join(self._clock, clock)

    def host_knows(self, clock: Clock) -> None:
        join(self._clock, clock)

    def mark(self, stream: "Stream", name: str, after: Operation | None = None) -> Operation:
        join(stream.clock, self._clock)
        stream.clock[stream.actor] += 1
        return self.timeline.put(stream.queue, Operation(name, after=after))

    def adopt(self, stream: "Stream") -> tuple[int, Queue]:
        self._streams.append(stream)
        name = f"stream {len(self._streams)}"
        return len(self._streams), self.timeline.new_queue(name)

    def _launch(
        self,
        name: str,
        reads: Sequence[Span],
        writes: Sequence[Span],
        taken_s: float,
        run: Callable[[], None] | None,
    ) -> Operation:
        self.call()
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused.error
        return self._queue(name, reads, writes, taken_s, run, None)

    def _queue(
        self,
        name: str,
        reads: Sequence[Span],
        writes: Sequence[Span],
        taken_s: float,
        land: Callable[[], None] | None,
        engine: Engine | None,
    ) -> Operation:
        stream = self.current
        join(stream.clock, self._clock)
        stream.clock[stream.actor] += 1
        access = Access(stream.actor, stream.clock[stream.actor], f"{name} ({stream.queue.name})")
        with self._noted():
            for span in reads:
                span.region.shadow.read(span.start, span.end, access, stream.clock)
            for span in writes:
                span.region.shadow.write(span.start, span.end, access, stream.clock)
        operation = Operation(name, taken_s, engine, land, writes=writes)
        return self.timeline.put(stream.queue, operation)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.found = error
            raise

    def _as_host(self, name: str) -> Access:
        self._clock[_HOST] += 1
        return Access(_HOST, self._clock[_HOST], f"{name} (host)")

    def _refuse(self, code: Code) -> Code:
        self._refused = code
        return code

    def _locked(self, tensor: torch.Tensor) -> bool:
        """Whether a copy engine reaches it. Raises where only its first part is page-locked."""
        found = self.region(tensor)
        if found is None:
            return False
        if tensor.data_ptr() + tensor.nbytes > found.base + found.size_bytes:
            raise Code.INVALID_VALUE.error
        return True


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, cuda: FakeCuda, device: object = None, priority: int = 0) -> None:
        self.cuda = cuda
        self.actor, self.queue = cuda.adopt(self)
        self.clock: Clock = {self.actor: 0}

    def wait_event(self, event: "Event") -> None:
        self.cuda.call()
        if event.mark is not None:
            join(self.clock, event.clock)
            self.cuda.mark(self, "wait", event.mark)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = Event(self.cuda) if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return self.record_event().query()

    def synchronize(self) -> None:
        self.cuda.call()
        self.cuda.host_waits(self.cuda.mark(self, "synchronize"), self.clock)


class Event:
    """torch.cuda.Event. One that was never recorded makes nobody wait."""

    def __init__(
        self,
        cuda: FakeCuda,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> None:
        self.cuda, self._timing = cuda, enable_timing
        self.mark: Operation | None = None
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = self.cuda.current if stream is None else stream
        self.cuda.call()
        self.mark = self.cuda.mark(stream, "event")
        self.clock = dict(stream.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (self.cuda.current if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        self.cuda.call()
        if self.mark is not None and not self.mark.ended:
            return False
        self.cuda.host_knows(self.clock)
        return True

    def synchronize(self) -> None:
        self.cuda.call()
        if self.mark is not None:
            self.cuda.host_waits(self.mark, self.clock)

    def elapsed_time(self, later: "Event") -> float:
        """Milliseconds."""
        self.cuda.call()
        if not (self._timing and later._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        begun, ended = self.mark, later.mark
        if begun is None or ended is None or not (begun.ended and ended.ended):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        assert begun.ends_s is not None and ended.ends_s is not None
        return (ended.ends_s - begun.ends_s) * 1e3
