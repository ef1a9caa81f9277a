"""Fills slots: from "these experts have a slot" to "they are here", and counted.

Between the decisions (residency.py, lease.py) and the bytes (transfer.py).
"""

import logging
import time
from collections.abc import Sequence

from moestro.cache.facts import Phase
from moestro.cache.pack import Pack, TensorViews
from moestro.cache.policy import LinkCounters, Residency
from moestro.cache.tiers import (
    MOST_BYTES_AT_ONCE,
    Arena,
    Completion,
    Failure,
    LendingReader,
    Reader,
    ReadRequest,
    runs_of,
)

_log = logging.getLogger("moestro.cache")


class Loader:
    """Owns the reader, and the link's side of the counters."""

    def __init__(self, pack: Pack, arena: Arena, residency: Residency, reader: Reader) -> None:
        self._pack = pack
        self._arena = arena
        self._residency = residency
        self._counters = residency.counters
        self._reader = reader
        self._below = reader if isinstance(reader, LendingReader) else None
        self._layers = pack.spec.layers
        self.strides = [layer.layout.stride_bytes for layer in self._layers]  # of the largest
        self._loads = [[0] * layer.num_experts for layer in self._layers]
        self._under_way: list[ReadRequest] = []

    @property
    def in_flight(self) -> int:
        """Requests that the reader has not completed."""
        return len(self._under_way)

    @property
    def moving(self) -> set[int]:
        """Slots that belong to the reader."""
        return {slot for request in self._under_way for slot in request.slots}

    @property
    def loaded_bytes(self) -> int:
        """By the loads of every expert and its size: what the links' bytes must come to."""
        return sum(
            count * stride
            for layer, counts in zip(self._layers, self._loads, strict=True)
            for count, stride in zip(counts, layer.strides, strict=True)
        )

    def start(
        self, layer: int, experts: Sequence[int], slots: Sequence[int], *, guessed: bool
    ) -> None:
        """Reads `experts`, ascending, into the slots they were given, in one submission."""
        sizes, at = self._layers[layer].strides, 0
        requests: list[ReadRequest] = []
        for run in runs_of(experts, max(1, MOST_BYTES_AT_ONCE // self.strides[layer])):
            given = tuple(slots[at : at + len(run)])
            at += len(run)
            buffers = self._arena.buffers(given, sizes[run.start : run.stop])
            requests.append(ReadRequest(layer, run, given, buffers, guessed))
        if self._layers[layer].each:
            for expert, slot in zip(experts, slots, strict=True):
                self._arena.show(layer, slot, self._layers[layer].each[expert])
        link = self._counters.prefetch if guessed else self._counters.demand
        link.started += len(slots)
        self._under_way.extend(requests)
        self._reader.submit(requests)

    def resident_below(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of `experts` that lie in a tier that can be computed with, in this order."""
        return [] if self._below is None else self._below.resident(layer, experts)

    def lend(self, layer: int, experts: Sequence[int], *, alone: bool) -> list[TensorViews]:
        """Views of `experts`, resident below, valid until `give_back`."""
        assert self._below is not None, "somebody is resident below"
        return self._below.lend(layer, experts, alone=alone)

    def give_back(self) -> None:
        assert self._below is not None, "somebody was lent"
        self._below.give_back()

    def poll(self) -> list[tuple[int, Failure | None]]:
        """Slots whose read ended since the last call, with the error if it failed."""
        return self._settle(self._reader.poll()) if self.in_flight else []

    def wait(self, phase: Phase) -> list[tuple[int, Failure | None]]:
        """Like `poll`, waiting for one at least; the time counts as a stall of `phase`."""
        if not self.in_flight:
            raise RuntimeError("nothing is under way")
        started = time.perf_counter()
        completions = self._reader.wait()
        waited_s = time.perf_counter() - started
        self._counters.stalled(phase, waited_s)
        if not self._residency.table.guessed.isdisjoint(completions[0].request.slots):
            self._counters.guesses.waited_behind(waited_s)
        return self._settle(completions)

    def close(self) -> None:
        self._reader.close()

    def _settle(self, completions: Sequence[Completion]) -> list[tuple[int, Failure | None]]:
        ended: list[tuple[int, Failure | None]] = []
        for completion in completions:
            request, error = completion.request, completion.error
            self._under_way.remove(request)
            link = self._counters.prefetch if request.guessed else self._counters.demand
            link.read_s += completion.read_s
            if error is None:
                self._arrived(request, link)
            else:
                link.failed += len(request.slots)
                _log.warning("%s", error)
                for slot in request.slots:
                    self._residency.failed(slot)
            ended += [(slot, error) for slot in request.slots]
        return ended

    def _arrived(self, request: ReadRequest, link: LinkCounters) -> None:
        layer, experts = request.layer, request.experts
        self._residency.table.arrived(request.slots)
        self._pack.proved(layer, experts)
        sizes, loads = self._layers[layer].strides, self._loads[layer]
        link.loads += len(experts)
        self._counters.loads[layer] += len(experts)
        for expert in experts:
            link.bytes += sizes[expert]
            loads[expert] += 1
