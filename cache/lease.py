"""The experts of one layer event, held while they are used.

residents              yielded first, in the order of the request; pinned from the start
missing, with a slot   read at once, yielded as they arrive; pinned from the start
missing, lent          lent from the tier below, yielded after the residents
missing, without       read in waves into slots used in turn (the rotation), each as soon as its
                       expert was yielded and is done
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType

import torch

from moestro.cache.facts import ExpertKey, Phase, Routed
from moestro.cache.pack import TensorViews
from moestro.cache.policy import NOWHERE, Residency, missing
from moestro.cache.tiers import MOST_BYTES_AT_ONCE, Arena, Failure

from .loader import Loader

GROUP_BYTES = 1 << 20  # of experts: computing with them takes as long as asking for it
ComputeBelow = Callable[[int, int], int]
"""(residents, missing ones that lie in the tier below) -> how many of these to lend from there."""


class Lease:
    """A context manager to iterate once, inside its block; only one is open at a time.

    `for expert, tensors in lease` yields every expert once. `tensors` maps names to views into
    the expert's slot, to be read only, and valid until the next turn of the loop or the end of
    the block. `groups` yields the same, those together that are here together. Raises ReadFailed
    or PackInvalid when an expert cannot be had.
    """

    def __init__(
        self,
        loader: Loader,
        residency: Residency,
        arena: Arena,
        layer: int,
        experts: Sequence[int],
        phase: Phase,
        routed: Routed | None = None,
        compute_below: ComputeBelow | None = None,
    ) -> None:
        if len(set(experts)) != len(experts) or (experts and min(experts) < 0):
            raise ValueError(f"expert numbers must be distinct and not negative: {experts}")
        self.open = True
        self._loader, self._residency, self._table = loader, residency, residency.table
        self._counters = residency.counters
        self._layer, self._phase = layer, phase
        self._arena, self._views = arena, arena.views[layer]
        self._iterated = False
        self._pending: list[int] = []  # experts that wait for a slot
        self._coming: set[int] = set()  # slots of this lease being read into
        self._arrived: deque[int] = deque()  # slots not yielded yet
        self._rotation: deque[int] = deque()  # slots given to those who wait, in this order
        self._done: set[int] = set()  # slots of the rotation whose expert was yielded and is done
        self._more: set[int] = set()  # slots that joined after the residents
        self._given: set[int] = set()  # slots of residents that were given up
        self._failure: Failure | None = None

        self._below: list[tuple[int, TensorViews]] = []  # computed with in the tier below

        self._here = residency.ask(layer, experts, phase, routed)
        self._count_hits(len(experts))
        if len(self._here) < len(experts):
            self._demand(experts, compute_below, admit=routed is not None)

    @property
    def waiting(self) -> int:
        """Experts of this lease whose read could not be started for want of a slot."""
        return len(self._pending)

    @property
    def held(self) -> set[int]:
        """Slots that nobody else may have now: all of this lease but those given up for others."""
        return set(self._here) - self._given | self._more

    @property
    def coming(self) -> frozenset[int]:
        """Slots that this lease waits for."""
        return frozenset(self._coming)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # Left early: a slot must not be given away while a reader still writes into it.
            while self._coming:
                self.collect(self._loader.wait(self._phase))
            self._arena.used(self._table.pinned)
        finally:  # DeviceFailed says so again to the next one: a block that was left is left
            self._counters.abandoned += len(self._pending)
            self._pending.clear()
            self._table.pinned.clear()
            if self._below:
                self._loader.give_back()
            self.open = False

    def groups(self) -> Iterator[list[tuple[int, dict[str, torch.Tensor]]]]:
        """All residents at once, in the order of the request, then whoever has arrived since.

        One group, where all have arrived when it begins. Small experts wait for each other: one
        more group costs more than computing with them does.
        """
        self._once()
        if self._coming:
            self.collect(self._loader.poll())
        whole = not (self._coming or self._pending or self._failure)
        first = [*self._here, *self._arrived] if whole else self._here
        if whole:
            self._arrived.clear()
        if first:
            yield self._lent(first)
            if self._pending:
                for slot in self._here:
                    self._release(slot)
        if self._below:
            yield self._below
        while self._coming or self._arrived or self._pending or self._failure:
            slots = self._gathered()
            yield self._lent(slots)
            if self._pending:
                for slot in slots:
                    self._release(slot)

    def _gathered(self) -> list[int]:
        """Slots that have arrived: one at least, and as many as make a group worth its cost."""
        slots, size_bytes = [self._next()], self._loader.strides[self._layer]
        while True:
            slots += self._arrived
            self._arrived.clear()
            enough = len(slots) * size_bytes >= GROUP_BYTES
            if enough or not self._coming or self._pending or self._failure:
                return slots
            self.collect(self._loader.wait(self._phase))

    def _lent(self, slots: Sequence[int]) -> list[tuple[int, dict[str, torch.Tensor]]]:
        views, keys = self._views, self._table.keys
        # A pinned slot has an expert.
        return [(keys[slot].expert, views[slot]) for slot in slots]  # type: ignore[union-attr]

    def _once(self) -> None:
        if self._iterated:
            raise RuntimeError("a lease is iterated once")
        self._iterated = True

    def __iter__(self) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        self._once()
        yield from self._below
        views, keys = self._views, self._table.keys
        for slot in self._slots():
            key = keys[slot]
            assert key is not None, "a pinned slot has an expert"
            yield key.expert, views[slot]
            if self._pending:
                self._release(slot)

    def _slots(self) -> Iterator[int]:
        yield from self._here
        while self._coming or self._arrived or self._pending or self._failure:
            yield self._next()

    def collect(self, ended: Iterable[tuple[int, Failure | None]]) -> None:
        """Takes note of reads that ended, its own and others."""
        for slot, failure in ended:
            if slot in self._coming:
                self._coming.remove(slot)
                if failure is None:
                    self._arrived.append(slot)
                else:
                    self._failure = failure
                    self._more.remove(slot)

    def _count_hits(self, requested: int) -> None:
        table, counters, layer = self._table, self._counters, self._layer
        counters.guesses.event()
        counters.requested[layer] += requested
        counters.hits[layer] += len(self._here)
        if table.guessed:
            guessed = table.guessed & table.pinned
            table.guessed -= guessed
            counters.hits[layer] -= len(guessed)
            counters.prefetch_hits[layer] += len(guessed)
            counters.used += len(guessed)
            counters.guesses.asked(self._keys_in(guessed), late=False)

    def _demand(
        self, experts: Sequence[int], compute_below: ComputeBelow | None, *, admit: bool
    ) -> None:
        """Everything that is not here: joins the reads under way and starts those that fit."""
        table, row, keys = self._table, self._table.where[self._layer], self._residency.keys
        self._pending = sorted(missing(row, experts))
        if compute_below is not None:
            self._borrow(experts, compute_below)
        late = [row[e] for e in experts if row[e] != NOWHERE and not table.ready[row[e]]]
        self._counters.misses[self._layer] += len(self._pending) + len(self._below) + len(late)
        self._counters.late += len(late)
        table.guessed.difference_update(late)
        if late:
            self._counters.guesses.asked(self._keys_in(late), late=True)
        self._counters.guesses.missed(keys[self._layer][expert] for expert in self._pending)
        table.pinned.update(late)
        self._coming.update(late)
        self._more.update(late)
        if admit:
            self._pending = self._residency.admit(self._layer, self._pending, experts)
        slots = self._assign(experts)
        while self._pending and not (slots or self._here or self._coming):
            # All slots are taken by a prefetch of other experts, which cannot be called back.
            self._loader.wait(self._phase)
            slots = self._assign(experts)
        if len(slots) < len(self._pending):
            self._rotation.extend(self._residency.rotation([*self._here, *late], slots))
        self._start(slots)

    def _borrow(self, experts: Sequence[int], compute_below: ComputeBelow) -> None:
        """Leaves some of those who wait in the tier below, to be computed with there."""
        wanting = set(self._pending)
        below = self._loader.resident_below(self._layer, [x for x in experts if x in wanting])
        count = compute_below(len(self._here), len(below)) if below else 0
        if not count:
            return
        chosen = below[-count:]  # the last choices: the first are the likelier to be asked again
        self._pending = sorted(wanting.difference(chosen))
        views = self._loader.lend(self._layer, chosen, alone=not self._pending)
        self._below = list(zip(chosen, views, strict=True))
        self._counters.computed_below[self._layer] += count

    def _keys_in(self, slots: Iterable[int]) -> list[ExpertKey]:
        return [key for slot in slots if (key := self._table.keys[slot]) is not None]

    def _assign(self, experts: Sequence[int]) -> list[int]:
        return self._residency.assign(self._layer, self._pending, experts, self._phase)

    def _start(self, slots: Sequence[int]) -> None:
        """Reads the first experts that wait into `slots`, which they were given."""
        count = len(slots)
        batch, self._pending = self._pending[:count], self._pending[count:]
        if batch:
            self._table.pinned.update(slots)
            self._coming.update(slots)
            self._more.update(slots)
            pairs = sorted(zip(batch, slots, strict=True))  # neighbours are read in one go
            batch, slots = [expert for expert, _ in pairs], [slot for _, slot in pairs]
            self._loader.start(self._layer, batch, slots, guessed=False)

    def _next(self) -> int:
        """The next slot to yield, waiting for it if need be."""
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            if not self._coming:
                self._refill(min(len(self._rotation), len(self._pending)))
            self.collect(self._loader.wait(self._phase))
        return self._arrived.popleft()

    def _release(self, slot: int) -> None:
        """`slot` was yielded and is done: others wait for it."""
        if not self.open:
            raise RuntimeError("the lease's block was left")
        self._done.add(slot)
        # Half of the rotation at a time: one half is computed with while the other is read into.
        enough = min(
            max(1, len(self._rotation) // 2),
            max(1, MOST_BYTES_AT_ONCE // self._loader.strides[self._layer]),
            len(self._pending),
        )
        if all(each in self._done for each in islice(self._rotation, enough)):
            self._refill(enough)

    def _refill(self, count: int) -> None:
        """Gives up the first `count` slots of the rotation, all done, for those who wait."""
        old = [self._rotation.popleft() for _ in range(count)]
        self._arena.used(old)
        self._table.pinned.difference_update(old)
        self._more.difference_update(old)
        self._done.difference_update(old)
        self._given.update(old)
        new = self._residency.replace(self._layer, old, self._pending[:count])
        self._rotation.extend(new)
        self._start(new)
