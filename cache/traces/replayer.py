"""A trace run again without a model: what other budgets and policies would have hit.

`replay` decides with the live cache's own code (residency.py), one layer event at a time, on an
empty cache; a run recorded from its first event and without prefetch is counted exactly as it was.
Events are atomic: an expert hits when it was there before its event began.

`belady` is the ceiling. It knows the future: after each event, of all experts that are there or
were just used, it keeps those asked for again soonest, as many as there are slots. It may keep none
of those just used (bypass), and they need no slot for being used. An expert kept from one event to
its next occupies one slot in between, and filling slots with such spans by the earliest end fits
in the most of them: no policy, prefill streaming or not, has more hits. Prefetch can have more.

Knows no tensors.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest

from moestro.cache.facts import ExpertKey, Phase
from moestro.cache.policy import Counters, Policy, Residency, SlotTable, missing

from .tracefile import TraceEvent


@dataclass(frozen=True, slots=True)
class LayerReplay:
    """Lookups of one layer. Without prefetch every miss is a load."""

    hits: int
    misses: int

    @property
    def loads(self) -> int:
        return self.misses


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a trace; the tuples are per layer."""

    slots: int
    prefill: tuple[LayerReplay, ...]
    decode: tuple[LayerReplay, ...]

    @property
    def layers(self) -> tuple[LayerReplay, ...]:
        """Both phases together, to be held against the live cache's statistics."""
        return tuple(
            LayerReplay(one.hits + other.hits, one.misses + other.misses)
            for one, other in zip(self.prefill, self.decode, strict=True)
        )

    def hit_rate(self, phase: Phase) -> float:
        """Share of the distinct experts asked for, over all layers; 0 when none was."""
        layers = self.prefill if phase is Phase.PREFILL else self.decode
        hits = sum(layer.hits for layer in layers)
        return hits / (hits + sum(layer.misses for layer in layers) or 1)

    def loaded_bytes(self, strides_bytes: Sequence[int]) -> int:
        """What was read, by the size of each layer's blobs."""
        pairs = zip(self.layers, strides_bytes, strict=True)
        return sum(layer.loads * stride for layer, stride in pairs)


class _Tally:
    """Hits and requests, [phase][layer]."""

    def __init__(self, layers: int) -> None:
        self._hits = {phase: [0] * layers for phase in Phase}
        self._asked = {phase: [0] * layers for phase in Phase}

    def count(self, event: TraceEvent, hits: int) -> None:
        self._hits[event.phase][event.layer] += hits
        self._asked[event.phase][event.layer] += len(event.experts)

    def result(self, slots: int) -> Replayed:
        return Replayed(slots, self._of(Phase.PREFILL), self._of(Phase.DECODE))

    def _of(self, phase: Phase) -> tuple[LayerReplay, ...]:
        pairs = zip(self._hits[phase], self._asked[phase], strict=True)
        return tuple(LayerReplay(hits, asked - hits) for hits, asked in pairs)


def replay(
    events: Iterable[TraceEvent], experts_per_layer: Sequence[int], slots: int, policy: Policy
) -> Replayed:
    """Runs `events` through `slots` slots under a fresh `policy`, which is used up."""
    tally = _Tally(len(experts_per_layer))
    for event, hits in replay_events(events, experts_per_layer, slots, policy):
        tally.count(event, hits)
    return tally.result(slots)


def replay_events(
    events: Iterable[TraceEvent], experts_per_layer: Sequence[int], slots: int, policy: Policy
) -> Iterator[tuple[TraceEvent, int]]:
    """Like `replay`, with the hits of each event."""
    table, counters = SlotTable(slots, experts_per_layer), Counters(len(experts_per_layer))
    residency = Residency(table, policy, counters, experts_per_layer)
    for event in events:
        yield event, _run(residency, event)


def _run(residency: Residency, event: TraceEvent) -> int:
    """One event, as a lease would do it whose every read ends at once; its hits."""
    table, layer, experts = residency.table, event.layer, event.experts
    row = table.where[layer]
    held = residency.ask(layer, experts, event.phase, event.routed)
    waiting = sorted(missing(row, experts))
    if waiting and event.routed is not None:
        waiting = residency.admit(layer, waiting, experts)
    slots = residency.assign(layer, waiting, experts, event.phase)
    _arrive(table, slots)
    waiting = waiting[len(slots) :]
    rotation = deque(residency.rotation(held, slots) if waiting else ())
    for expert in waiting:
        slot = rotation.popleft()
        table.pinned.discard(slot)
        slots = residency.replace(layer, [slot], [expert])
        _arrive(table, slots)
        rotation.extend(slots)
    table.pinned.clear()
    return len(held)


def _arrive(table: SlotTable, slots: Sequence[int]) -> None:
    table.arrived(slots)
    table.pinned.update(slots)


def belady(events: Iterable[TraceEvent], experts_per_layer: Sequence[int], slots: int) -> Replayed:
    """The most hits that any policy could have had in so many slots, by its definition above."""
    known, tally = list(events), _Tally(len(experts_per_layer))
    never = len(known)
    uses = _next_uses(known)
    kept: dict[ExpertKey, int] = {}  # and the event that asks for it next
    for event, following in zip(known, uses, strict=True):
        hits = 0
        for expert, use in zip(event.experts, following, strict=True):
            key = ExpertKey(event.layer, expert)
            hits += kept.pop(key, None) is not None
            if use < never:
                kept[key] = use
        tally.count(event, hits)
        for key in nlargest(len(kept) - slots, kept, key=kept.__getitem__):
            del kept[key]
    return tally.result(slots)


def _next_uses(events: Sequence[TraceEvent]) -> list[list[int]]:
    """For each event and each of its experts, the number of the event that asks for it next."""
    following: dict[ExpertKey, int] = {}
    found = []
    for number in range(len(events) - 1, -1, -1):
        event = events[number]
        keys = [ExpertKey(event.layer, expert) for expert in event.experts]
        found.append([following.get(key, len(events)) for key in keys])
        following.update(dict.fromkeys(keys, number))
    return found[::-1]
