"""From a host slot to a device slot: the link between two tiers. Knows slots, no experts to choose.

Copies are cut into chunks, and a demanded copy goes before what is left of a guessed one, so that
it never waits behind a whole guessed expert.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moestro.cache.facts import LinkStats

CHUNK_BYTES = 2 << 20
"""80 us of a 25 GB/s link: long enough to run at full speed, short enough to wait for."""


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link that is only imagined: what it would carry, and how long each copy takes to begin."""

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_bytes_per_s < float("inf"):
            raise ValueError(f"a bandwidth is above 0, not {self.bandwidth_bytes_per_s}")
        if not 0 <= self.latency_s < float("inf"):
            raise ValueError(f"a latency is not negative, not {self.latency_s}")

    def __str__(self) -> str:
        return (
            f"emulated {self.bandwidth_bytes_per_s / 1e9:.4g} GB/s, {self.latency_s * 1e6:.4g} us"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """One expert on its way. Both slots belong to the link until it says that the copy ended."""

    layer: int
    source: int  # host slot
    target: int  # device slot
    size_bytes: int
    guessed: bool


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that ended: the device slot holds the expert, the host slot may change."""

    copy: Copy
    busy_s: float  # of the link, for this copy


class Link(Protocol):
    """Submits from one thread; the same thread collects what ended, in any order."""

    def submit(self, copies: Sequence[Copy]) -> None:
        """Queues all at once; what is demanded goes before what is guessed."""

    def poll(self) -> list[Copied]:
        """What ended since the last call; does not wait."""

    def wait(self) -> list[Copied]:
        """Like `poll`, but with at least one in it. Only while something is under way."""

    def due_s(self) -> float:
        """In how long to ask again, when there is something else to wait for meanwhile."""

    def copy_s(self, size_bytes: int) -> float:
        """How long a copy of this size takes while nothing else is under way."""

    def stats(self) -> LinkStats: ...

    def close(self) -> None:
        """Ends copies under way, or drops them where nothing has begun. Idempotent."""


@dataclass(slots=True, eq=False)
class _Flight:
    copy: Copy
    left_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.left_bytes = self.copy.size_bytes


WAKES_LATE_S = 100e-6
"""Seen: 80 us. As much as a 25 GB/s link carries an expert of 2 MB in."""


def sleep_exactly(seconds: float) -> None:
    """Sleeps, and awaits the last moments awake: a sleeper is woken too late for a fast link."""
    end_s = time.perf_counter() + seconds
    if seconds > WAKES_LATE_S:
        time.sleep(seconds - WAKES_LATE_S)
    while time.perf_counter() < end_s:
        pass


class EmulatedLink:
    """A link of set speed, so that a slow one can be measured where there is none.

    A clock instead of wires: a chunk ends at max(when it was submitted, when the link was free)
    + its bytes / bandwidth, a copy's first one `latency_s` later. Waiting sleeps. Every figure that
    comes from it says "emulated".
    """

    def __init__(
        self,
        spec: LinkSpec,
        land: Callable[[Copy], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = sleep_exactly,
    ) -> None:
        """`land` puts the expert into its device slot, when its copy has ended and not before."""
        self._spec = spec
        self._land = land
        self._clock = clock
        self._sleep = sleep
        self._demanded: deque[_Flight] = deque()
        self._guessed: deque[_Flight] = deque()
        self._current: _Flight | None = None  # still the first of its queue
        self._chunk_ends_s = 0.0
        self._ended: list[Copied] = []
        self._copies = self._chunks = self._bytes = 0
        self._busy_s = 0.0

    def submit(self, copies: Sequence[Copy]) -> None:
        now_s = self._clock()
        self._advance(now_s)
        for copy in copies:
            (self._guessed if copy.guessed else self._demanded).append(_Flight(copy))
        if self._current is None:
            self._begin(now_s)

    def poll(self) -> list[Copied]:
        self._advance(self._clock())
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> list[Copied]:
        while not (ended := self.poll()):
            self._sleep(self.due_s())
        return ended

    def due_s(self) -> float:
        """Until the next copy ends, if nothing else is submitted."""
        current, first = self._current, next(iter((*self._demanded, *self._guessed)), None)
        if current is None or first is None:
            return 0.0
        end_s = self._chunk_ends_s + first.left_bytes / self._spec.bandwidth_bytes_per_s
        if first is not current and first.left_bytes == first.copy.size_bytes:
            end_s += self._spec.latency_s
        return max(0.0, end_s - self._clock())

    def copy_s(self, size_bytes: int) -> float:
        return self._spec.latency_s + size_bytes / self._spec.bandwidth_bytes_per_s

    def stats(self) -> LinkStats:
        return LinkStats(
            name=str(self._spec),
            emulated=True,
            copies=self._copies,
            copied_bytes=self._bytes,
            chunks=self._chunks,
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        self._demanded.clear()
        self._guessed.clear()
        self._current = None

    def _advance(self, now_s: float) -> None:
        """Turns the link's clock to `now_s`."""
        while self._current is not None and self._chunk_ends_s <= now_s:
            if self._current.left_bytes == 0:
                self._end(self._current.copy)
            self._begin(self._chunk_ends_s)

    def _begin(self, at_s: float) -> None:
        """Starts the next chunk, if there is one."""
        queue = self._demanded or self._guessed
        self._current = queue[0] if queue else None
        if self._current is None:
            return
        flight, size_bytes = self._current, self._current.copy.size_bytes
        chunk = min(CHUNK_BYTES, flight.left_bytes)
        seconds = chunk / self._spec.bandwidth_bytes_per_s
        seconds += self._spec.latency_s if flight.left_bytes == size_bytes else 0.0
        flight.left_bytes -= chunk
        self._chunk_ends_s = at_s + seconds
        self._busy_s += seconds
        self._chunks += 1

    def _end(self, copy: Copy) -> None:
        (self._guessed if copy.guessed else self._demanded).popleft()
        self._land(copy)
        self._copies += 1
        self._bytes += copy.size_bytes
        self._ended.append(Copied(copy, self.copy_s(copy.size_bytes)))
