"""Layer events that ask for nearly all experts of their layer, one layer after the other.

    layer L runs                               its experts are here already
    what layer L + 1 lacks is being read       into slots that layer L - 1 has used

What runs needs no lease: until the next event begins, no slot of its layer changes hands.
"""

from collections.abc import Sequence

from moestro.cache.facts import Phase
from moestro.cache.pack import TensorViews
from moestro.cache.policy import Residency, missing
from moestro.cache.tiers import Arena

from .loader import Loader


class Sweeps:
    """Reads ahead for one cache, whose parts these are."""

    def __init__(self, loader: Loader, residency: Residency, arena: Arena) -> None:
        self.going = False
        """The last event was a sweep: what the next layer lacks is being read."""
        self._loader, self._residency, self._views = loader, residency, arena.views
        self._table, self._counters = residency.table, residency.counters

    def begins(self, layer: int, requested: int, phase: Phase) -> bool:
        """Takes note of an event of so many experts: whether it is a sweep."""
        self._residency.note(layer, requested, phase)
        self.going = self._residency.sweeps(layer, requested, phase)
        return self.going

    def lend(self, layer: int, experts: Sequence[int]) -> dict[int, TensorViews] | None:
        """The views of the distinct `experts`, which a sweep of `layer` asks for: all are hits.

        None, and nothing is counted, where one of them is not here yet.
        """
        table, counters = self._table, self._counters
        row, ready = table.where[layer], table.ready
        slots = [row[expert] for expert in experts]
        if not all(slot >= 0 and ready[slot] for slot in slots):
            return None
        counters.guesses.event()
        counters.requested[layer] += len(slots)
        ahead = table.guessed.intersection(slots)
        counters.hits[layer] += len(slots) - len(ahead)
        counters.prefetch_hits[layer] += len(ahead)
        counters.used += len(ahead)
        table.guessed -= ahead
        self._residency.line_up(layer, slots)
        self.read_on(layer)
        views = self._views[layer]
        return {expert: views[slot] for expert, slot in zip(experts, slots, strict=True)}

    def follow_prompt(self, layer: int, requested: int) -> bool:
        """A prompt's event of `layer` is over: whether the first that the next one lacks are read.

        It asks for nearly all, as `layer` did. The disk has work while nothing but attention runs.
        """
        following, residency = layer + 1, self._residency
        if following == len(self._views) or not residency.nearly_all(layer, requested):
            return False
        row = self._table.where[following]
        wanted = missing(row, range(len(row)))
        slots = residency.assign_for_prompt(following, wanted) if wanted else []
        self._start(following, wanted, slots)
        return bool(slots)

    def read_on(self, layer: int) -> None:
        """Reads what the layer after `layer` lacks, behind the reads that are demanded."""
        following = (layer + 1) % len(self._views)
        if not self._residency.will_sweep(following):
            return
        row = self._table.where[following]
        wanted = missing(row, range(len(row)))
        self._start(following, wanted, self._residency.assign_ahead(following, wanted, layer))

    def _start(self, layer: int, wanted: Sequence[int], slots: Sequence[int]) -> None:
        """Reads the first of `wanted` into `slots`, which they were given."""
        if slots:
            self._table.guessed.update(slots)
            self._counters.guesses.begun((), ())
            self._loader.start(layer, wanted[: len(slots)], slots, guessed=True)
