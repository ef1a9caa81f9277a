"""Work of a device in virtual time: queues, copy engines, and no tensors.

    stream ─ operation, operation, ... ─> starts when the one before it and what it waits for ended
                                          and, if it is a copy, its engine is free

Modelled: each stream runs its operations in their order; operations of several streams overlap; a
copy engine serves one copy at a time, and among those that are ready goes on with the stream it
served last (so engines were seen to behave), else takes the one queued first. An operation's bytes
move when it ends. Not modelled: that kernels share the multiprocessors, stream priorities, the
chunks into which a driver may cut a copy, a bound on what can be queued.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Engine:
    """Copies of one direction."""

    name: str
    serving: "Operation | None" = None
    last: "Queue | None" = None


@dataclass(eq=False)
class Operation:
    """Something queued on a stream. Without a duration it is a mark that ends at once."""

    name: str
    duration_s: float = 0.0
    engine: Engine | None = None
    land: Callable[[], None] | None = None  # moves its bytes
    after: "Operation | None" = None  # of another stream
    writes: Sequence[Any] = ()  # for who looks at what has ended
    number: int = 0
    queue: "Queue | None" = None
    ends_s: float | None = None  # known once it has begun
    ended: bool = False

    def move(self) -> None:
        if self.land is not None:
            land, self.land = self.land, None
            land()


@dataclass(eq=False)
class Queue:
    """A stream's operations that have not ended, in their order."""

    name: str
    operations: deque[Operation] = field(default_factory=deque)


class Timeline:
    """The device's clock, which is the host's, too. It only turns when somebody asks."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.queues: list[Queue] = []
        self.ended: list[Operation] = []
        """In the order of their ends; marks are left out."""
        self.queued: list[Operation] = []
        """In the order of their queueing; marks are left out."""
        self._numbers = 0

    def new_queue(self, name: str) -> Queue:
        self.queues.append(Queue(name))
        return self.queues[-1]

    def put(self, queue: Queue, operation: Operation) -> Operation:
        self._numbers += 1
        operation.number, operation.queue = self._numbers, queue
        queue.operations.append(operation)
        if operation.duration_s:
            self.queued.append(operation)
        self._begin()
        return operation

    def turn(self, seconds: float) -> None:
        """Whatever ends within `seconds` from now has ended then, and its bytes have moved."""
        until_s = self.now_s + seconds
        while (next_s := self._next_s()) <= until_s:
            self._go_to(next_s)
        self.now_s = until_s

    def wait_for(self, operation: Operation) -> None:
        """Turns the clock until it has ended; raises AssertionError where it never would."""
        while not operation.ended:
            next_s = self._next_s()
            assert next_s < math.inf, f"the host waits for ever for {operation.name}"
            self._go_to(next_s)

    def move_up_to(self, operation: Operation) -> None:
        """Moves now the bytes of whatever is ordered before `operation`, and its own.

        For work that is done when it is queued: it must find what it would find later.
        """
        queue = operation.queue
        assert queue is not None
        for each in list(queue.operations):
            if each.after is not None and not each.after.ended:
                self.move_up_to(each.after)
            each.move()
            if each is operation:
                return

    def _next_s(self) -> float:
        heads = (queue.operations[0] for queue in self.queues if queue.operations)
        return min((x.ends_s for x in heads if x.ends_s is not None), default=math.inf)

    def _go_to(self, at_s: float) -> None:
        self.now_s = at_s
        for queue in self.queues:
            while queue.operations and queue.operations[0].ends_s == at_s:
                self._end(queue)
        self._begin()

    def _begin(self) -> None:
        """Starts whatever can start now."""
        while True:
            ready = [head for queue in self.queues if (head := self._ready(queue)) is not None]
            for head in ready:
                if head.engine is None:
                    self._start(head)
            if not any(head.ended for head in ready):
                break
        for engine in {id(head.engine): head.engine for head in ready}.values():
            if engine is not None and engine.serving is None:
                own = (x for x in ready if x.engine is engine and x.queue is engine.last)
                any_of_it = (x for x in ready if x.engine is engine)
                self._start(next(own, None) or min(any_of_it, key=lambda x: x.number))

    def _ready(self, queue: Queue) -> Operation | None:
        head = queue.operations[0] if queue.operations else None
        if head is None or head.ends_s is not None:
            return None
        return head if head.after is None or head.after.ended else None

    def _start(self, operation: Operation) -> None:
        assert operation.queue is not None
        operation.ends_s = self.now_s + operation.duration_s
        if operation.engine is not None:
            operation.engine.serving, operation.engine.last = operation, operation.queue
        if not operation.duration_s:
            self._end(operation.queue)

    def _end(self, queue: Queue) -> None:
        operation = queue.operations.popleft()
        operation.ended = True
        if operation.engine is not None:
            operation.engine.serving = None
        if operation.duration_s:
            self.ended.append(operation)
        operation.move()
