"""Which accesses to memory are ordered: a happens-before race detector.

An actor (the host, a stream) does one thing after another and counts them. Its clock says, for
every actor, how many of that one's things are known to have ended before what it does next; what
synchronises joins clocks. Two accesses to a byte, one of them a write, are a race unless the later
one's clock has the earlier one in it. After Lamport (1978), "Time, clocks, and the ordering of
events", and Flanagan and Freund (2009), "FastTrack: efficient and precise dynamic race detection".
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Clock = dict[int, int]
"""How many things are known to have ended, by actor."""


class Race(AssertionError):
    """Two accesses to the same bytes that nothing orders; the message names both."""


class Unwritten(AssertionError):
    """Bytes are read that nobody has written, or that are being filled."""


def join(clock: Clock, other: Mapping[int, int]) -> None:
    """From now on, whatever `other` knows to have ended has ended for `clock`, too."""
    for actor, count in other.items():
        if clock.get(actor, 0) < count:
            clock[actor] = count


@dataclass(frozen=True, slots=True)
class Access:
    """One thing that an actor does: its `count`-th."""

    actor: int
    count: int
    name: str

    def ended_before(self, clock: Mapping[int, int]) -> bool:
        return clock.get(self.actor, 0) >= self.count


@dataclass(slots=True)
class _Bytes:
    """What was last done to a range of bytes."""

    written: Access | None
    garbage: bool = False  # after `written` they hold nothing that may be read
    reads: dict[int, Access] = field(default_factory=dict)  # the last one of each actor


class Shadow:
    """The accesses to one piece of memory, by byte range."""

    def __init__(self, size_bytes: int, label: str, written: Access | None = None) -> None:
        """`written`: who has filled it; None: nobody, and to read it is an error."""
        self.size_bytes, self.label = size_bytes, label
        self._starts = [0]
        self._states = [_Bytes(written)]

    def read(self, start: int, end: int, access: Access, clock: Mapping[int, int]) -> None:
        """Raises Race, Unwritten."""
        for at, state in self._within(start, end):
            if state.written is None:
                raise Unwritten(f"{access.name} reads {self._at(at)}, which nobody has written")
            self._ordered(at, state.written, access, clock)
            if state.garbage:
                raise Unwritten(
                    f"{access.name} reads {self._at(at)}, garbage since {state.written.name}"
                )
            state.reads[access.actor] = access

    def write(
        self,
        start: int,
        end: int,
        access: Access,
        clock: Mapping[int, int],
        *,
        garbage: bool = False,
    ) -> None:
        """Raises Race."""
        for at, state in self._within(start, end):
            for earlier in (state.written, *state.reads.values()):
                if earlier is not None:
                    self._ordered(at, earlier, access, clock)
            state.written, state.garbage = access, garbage
            state.reads.clear()

    def _ordered(self, at: int, earlier: Access, later: Access, clock: Mapping[int, int]) -> None:
        if earlier.actor != later.actor and not earlier.ended_before(clock):
            raise Race(f"at {self._at(at)}: {later.name} does not wait for {earlier.name}")

    def _at(self, at: int) -> str:
        return f"{self.label}[{at}]"

    def _within(self, start: int, end: int) -> Iterator[tuple[int, _Bytes]]:
        if not 0 <= start <= end <= self.size_bytes:
            raise IndexError(f"{start} to {end} of {self.label}, which has {self.size_bytes} bytes")
        if start < end:
            first, last = self._cut(start), self._cut(end)
            yield from list(zip(self._starts, self._states, strict=True))[first:last]

    def _cut(self, at: int) -> int:
        """The index of the range that begins at `at`, from now on."""
        index = bisect_left(self._starts, at)
        if at == self.size_bytes or (index < len(self._starts) and self._starts[index] == at):
            return index
        before = self._states[index - 1]
        self._starts.insert(index, at)
        self._states.insert(index, _Bytes(before.written, before.garbage, dict(before.reads)))
        return index
