"""Fills slots: from "these experts are missing" to "they are here", with the books kept.

Between the decisions (expert_cache.py, lease.py) and the bytes (transfer.py).
"""

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from .counters import Counters
from .errors import PackInvalid, ReadFailed
from .keys import ExpertKey, Phase
from .pack import Pack
from .policy import Policy
from .slots import SlotArena
from .table import NOWHERE, SlotTable
from .transfer import Completion, Reader, ReadRequest

_log = logging.getLogger("moestro.cache")

MOST_BYTES_AT_ONCE = 1 << 20
"""Longer reads gain nothing on the disk, and the first expert would wait for the last."""

Failure = ReadFailed | PackInvalid


class Loader:
    """Owns the reader; changes table, policy and counters together, so that they cannot part."""

    def __init__(
        self,
        pack: Pack,
        arena: SlotArena,
        table: SlotTable,
        policy: Policy,
        counters: Counters,
        reader: Reader,
    ) -> None:
        self._pack = pack
        self._arena = arena
        self._table = table
        self._policy = policy
        self._counters = counters
        self._reader = reader
        self.strides = [layer.layout.stride_bytes for layer in pack.spec.layers]
        self.keys = [
            [ExpertKey(index, expert) for expert in range(layer.num_experts)]
            for index, layer in enumerate(pack.spec.layers)
        ]
        self._under_way: list[ReadRequest] = []

    @property
    def in_flight(self) -> int:
        """Requests that the reader has not completed."""
        return len(self._under_way)

    @property
    def moving(self) -> set[int]:
        """Slots that belong to the reader."""
        return {slot for request in self._under_way for slot in request.slots}

    def start(self, layer: int, experts: Collection[int], *, guessed: bool) -> list[int]:
        """Reads `experts` into free slots (there are enough), in one submission; their slots."""
        table, keys, stride = self._table, self.keys[layer], self.strides[layer]
        requests: list[ReadRequest] = []
        given: list[int] = []
        for run in _runs(sorted(experts), max(1, MOST_BYTES_AT_ONCE // stride)):
            slots = tuple(table.begin(keys[expert]) for expert in run)
            buffers = tuple(self._arena.buffer(slot, stride) for slot in slots)
            requests.append(ReadRequest(layer, run, slots, buffers, guessed))
            given.extend(slots)
            for expert in run:
                self._policy.added(keys[expert])
        if guessed:
            table.guessed.update(given)
        link = self._counters.prefetch if guessed else self._counters.demand
        link.started += len(given)
        self._under_way.extend(requests)
        self._reader.submit(requests)
        return given

    def evict(self, slots: Sequence[int]) -> None:
        """Frees READY, unpinned slots."""
        for slot in slots:
            if slot in self._table.guessed:
                self._counters.wasted += 1
            key = self._table.evict(slot)
            self._policy.removed(key)
            self._counters.evictions[key.layer] += 1

    def make_room(self, count: int, protected: Collection[ExpertKey]) -> int:
        """Up to `count` free slots, evicting for them outside `protected`; how many there are."""
        table = self._table
        if table.free < count:
            wanted = count - table.free
            kept = self._policy.keys()
            staying = {key for slot in table.loading if (key := table.keys[slot]) is not None}
            staying.update(key for key in protected if key in kept)
            wanted = min(wanted, len(kept) - len(staying))
            victims = self._policy.victims(wanted, staying)
            if victims is None:
                raise RuntimeError(f"the policy has no {wanted} victims among {len(kept)} keys")
            self.evict([table.where[key.layer][key.expert] for key in victims])
        return min(count, table.free)

    def poll(self) -> list[tuple[int, Failure | None]]:
        """Slots whose read ended since the last call, with the error if it failed."""
        return self._settle(self._reader.poll()) if self.in_flight else []

    def wait(self, phase: Phase) -> list[tuple[int, Failure | None]]:
        """Like `poll`, waiting for one at least; the time counts as a stall of `phase`."""
        if not self.in_flight:
            raise RuntimeError("nothing is under way")
        started = time.perf_counter()
        completions = self._reader.wait()
        self._counters.stalled(phase, time.perf_counter() - started)
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
                link.loads += len(request.slots)
                link.bytes += len(request.slots) * self.strides[request.layer]
                self._counters.loads[request.layer] += len(request.slots)
            else:
                link.failed += len(request.slots)
                _log.warning("%s", error)
            for expert, slot in zip(request.experts, request.slots, strict=True):
                self._end(request.layer, expert, slot, failed=error is not None)
                ended.append((slot, error))
        return ended

    def _end(self, layer: int, expert: int, slot: int, *, failed: bool) -> None:
        if not failed:
            self._table.arrived(slot)
            self._pack.proved(layer, expert)
            return
        if slot in self._table.guessed:
            self._counters.wasted += 1
        self._policy.removed(self._table.failed(slot))


def missing(row: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Those without a slot, neither READY nor LOADING; `row` is the table's row of the layer."""
    return [expert for expert in experts if row[expert] == NOWHERE]


def _runs(experts: Sequence[int], longest: int) -> Iterator[range]:
    """Ascending experts as runs of neighbours, none longer than `longest`."""
    if not experts:
        return
    first = experts[0]
    for one, following in pairwise(experts):
        if following != one + 1 or following - first == longest:
            yield range(first, one + 1)
            first = following
    yield range(first, experts[-1] + 1)
