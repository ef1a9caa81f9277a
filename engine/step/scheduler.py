"""Who runs in the next step. Plain Python over lengths and bytes; no tensors, no threads.

A sequence is admitted whole or not at all: its longest possible KV is reserved first, so that
nothing that runs can ever run out of room. First come, first served.
"""

from collections import deque
from dataclasses import dataclass

from moestro.engine.facts import PromptTooLong, QueueFull

from .sequence import Batch, Part, Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_running: int  # sequences in one step
    max_waiting: int  # sequences behind them
    max_step_tokens: int  # tokens in one step
    kv_capacity_bytes: int
    kv_bytes_per_token: int


class Scheduler:
    """waiting -> running -> gone. `remove` works in either state."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.kv_reserved_bytes = 0

    def refuse_when_full(self, more: int = 0) -> None:
        """Raises QueueFull where `more` requests on their way would not find room."""
        waiting = len(self.waiting) + more
        if waiting >= self.limits.max_waiting:
            raise QueueFull(f"{waiting} requests wait already; try again later")

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull or, for what could never be admitted, PromptTooLong; changes nothing."""
        need = self.reserve_bytes(sequence)
        if need > self.limits.kv_capacity_bytes:
            raise PromptTooLong(
                f"the request needs {need} bytes of KV, there are {self.limits.kv_capacity_bytes}"
            )
        self.refuse_when_full()
        self.waiting.append(sequence)

    def next_batch(self) -> Batch:
        """Decoding sequences first, one token each; the rest of the step goes to prompts."""
        self._admit()
        room = self.limits.max_step_tokens
        parts: dict[int, Part] = {}
        decoding = [s for s in self.running if s.pending_tokens == 1]
        prompts = [s for s in self.running if s.pending_tokens > 1]
        for sequence in decoding + prompts:
            tokens = min(sequence.pending_tokens, room)
            if tokens > 0:
                parts[sequence.number] = Part(sequence, tokens)
                room -= tokens
        return Batch(tuple(parts[s.number] for s in self.running if s.number in parts))

    def remove(self, sequence: Sequence) -> None:
        """Let `sequence` go and give its room back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.kv_reserved_bytes -= self.reserve_bytes(sequence)
        else:
            self.waiting.remove(sequence)

    def reserve_bytes(self, sequence: Sequence) -> int:
        return sequence.capacity_tokens * self.limits.kv_bytes_per_token

    def check(self) -> None:
        """The sum of what the running ones reserve is what is reserved, and fits."""
        total = sum(self.reserve_bytes(sequence) for sequence in self.running)
        assert total == self.kv_reserved_bytes, f"reserved {self.kv_reserved_bytes}, sum {total}"
        assert total <= self.limits.kv_capacity_bytes
        assert len(self.running) <= self.limits.max_running

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.limits.max_running:
            need = self.reserve_bytes(self.waiting[0])
            if self.kv_reserved_bytes + need > self.limits.kv_capacity_bytes:
                return
            self.kv_reserved_bytes += need
            self.running.append(self.waiting.popleft())
