"""The cache: slots in front of a pack, or of a host tier. One thread calls it: it has no lock."""

from collections.abc import Sequence

from moestro.cache.facts import CacheStats, ExpertKey, LayerStats, PackSpec, Phase, Routed, SlotPlan
from moestro.cache.pack import Pack, TensorViews
from moestro.cache.policy import Counters, NextUse, Policy, Residency, SlotTable, agree, missing
from moestro.cache.tiers import (
    Arena,
    Reader,
    SlotArena,
    TierReader,
    pack_reader,
    time_reads,
)
from moestro.cache.traces import TraceWriter

from .lease import ComputeBelow, Lease
from .loader import Loader
from .sweeps import Sweeps


class ExpertCache:
    """Owns the slots, the reader and the pack; `close` ends all three."""

    def __init__(
        self,
        pack: Pack,
        plan: SlotPlan,
        *,
        policy: Policy | None = None,
        reader: Reader | None = None,
        arena: Arena | None = None,
        table: SlotTable | None = None,
        sweeping: bool = False,
    ) -> None:
        """Whoever is expected latest goes first and the pack's own reader reads, unless told.

        `sweeping`: where nearly all experts of a layer are asked for, those of the next layer are
        read ahead, and who is kept stays; so are the first ones of a prompt's next layer. `arena`
        and `table`, if given, are those that `reader` knows (two_tiers.py).
        """
        layers = pack.spec.layers
        self._pack = pack
        self._plan = plan
        if arena is None:
            arena = SlotArena(plan.slots, plan.slot_bytes, [layer.kinds for layer in layers])
        self._arena = arena
        self._counters = Counters(len(layers))
        experts = [layer.num_experts for layer in layers]
        self._table = SlotTable(plan.slots, experts) if table is None else table
        self._policy: Policy = NextUse() if policy is None else policy
        self._residency = Residency(
            self._table, self._policy, self._counters, experts, sweeping=sweeping
        )
        reader = pack_reader(pack) if reader is None else reader
        self._host = reader if isinstance(reader, TierReader) else None
        self._loader = Loader(pack, self._arena, self._residency, reader)
        self._sweeps = Sweeps(self._loader, self._residency, self._arena)
        self._lease: Lease | None = None
        self._trace: TraceWriter | None = None
        self._whole: dict[int, Sequence[TensorViews]] = {}  # by layer: where nobody leaves

    @property
    def plan(self) -> SlotPlan:
        return self._plan

    @property
    def spec(self) -> PackSpec:
        """Of the pack: what a trace's header is made from."""
        return self._pack.spec

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        phase: Phase,
        routed: Routed | None = None,
        compute_below: ComputeBelow | None = None,
    ) -> Lease:
        """One layer event: pins the residents, starts reading the others, and counts both.

        `compute_below(residents, below)` says how many of those that are missing here and lie in
        the tier below are lent from there instead: they are misses all the same, and move no byte.

        `experts` are distinct; `routed` says how a prompt's tokens chose among them. Use the lease
        at once as a context manager and leave it before the next call. Raises ValueError or
        IndexError for experts that cannot be.
        """
        if self._open_lease() is not None:
            raise RuntimeError("a lease is open: leave its block first")
        if self._loader.in_flight:
            self._loader.poll()
        parts = self._loader, self._residency, self._arena
        self._lease = Lease(*parts, layer, experts, phase, routed, compute_below)
        if self._trace is not None:
            self._trace.record(layer, experts, phase, routed)
        if self._sweeps.begins(layer, len(experts), phase) and not self._lease.waiting:
            self._sweeps.read_on(layer)
        return self._lease

    @property
    def sweeping(self) -> bool:
        """What the next layer lacks is being read ahead: no guess is wanted."""
        return self._sweeps.going

    def swept(
        self, layer: int, experts: Sequence[int], phase: Phase
    ) -> dict[int, TensorViews] | None:
        """A layer event without a lease, where a sweep (see __init__) asks for who is here.

        The views of the distinct `experts`, valid until the next event; each is a hit. None where
        this is no sweep, or one of them is not here: `acquire` them.
        """
        if self._open_lease() is not None or not self._sweeps.begins(layer, len(experts), phase):
            return None
        if self._loader.in_flight:
            self._loader.poll()
        lent = self._sweeps.lend(layer, experts)
        if lent is not None and self._trace is not None:
            self._trace.record(layer, experts, phase, None)
        return lent

    def follow_prompt(self, layer: int, requested: int) -> bool:
        """A prompt's event of so many experts of `layer` is over: reads for the next layer begin.

        For a cache that sweeps (see __init__), where that was nearly all of them; whether they do.
        """
        if self._open_lease() is not None or self._loader.in_flight:
            return False
        return self._sweeps.follow_prompt(layer, requested)

    def resident(
        self, layer: int, experts: Sequence[int], phase: Phase, routed: Routed | None = None
    ) -> Sequence[TensorViews] | None:
        """A layer event without a lease, where every expert of the model has a slot of its own.

        Nothing is ever evicted from such a cache, so what is lent need not be held. The views of
        all experts of the layer, by their numbers, and the same ones each time; each of the
        distinct `experts` is a hit. None where one of the layer is not here, or could be evicted,
        or one of `experts` was read ahead and is asked for the first time: `acquire` them.
        """
        if not self._plan.holds_all or self._loader.in_flight or self._open_lease() is not None:
            return None
        views = self._whole.get(layer) or self._whole_layer(layer)
        slots = self._table.where[layer]
        if views is None or not self._table.guessed.isdisjoint(slots[each] for each in experts):
            return None
        self._counters.guesses.event()
        self._counters.requested[layer] += len(experts)
        self._counters.hits[layer] += len(experts)
        if self._trace is not None:
            self._trace.record(layer, experts, phase, routed)
        return views

    def _whole_layer(self, layer: int) -> Sequence[TensorViews] | None:
        slots, ready, views = self._table.where[layer], self._table.ready, self._arena.views[layer]
        if not all(slot >= 0 and ready[slot] for slot in slots):
            return None
        self._whole[layer] = tuple(views[slot] for slot in slots)
        return self._whole[layer]

    def prefetch(self, layer: int, experts: Sequence[int], limit: int) -> int:
        """Reads up to `limit` missing ones of `experts` ahead of time; how many were started.

        Best guess first. Starts none while anything is read or waits to be: a read cannot be
        called back, and a demanded one would queue behind it. Evicts nothing that is pinned or
        among `experts`.
        """
        lease = self._open_lease()
        if self._loader.in_flight:
            ended = self._loader.poll()
            if lease is not None:
                lease.collect(ended)
        wanted = missing(self._table.where[layer], list(dict.fromkeys(experts)))[:limit]
        if not wanted:
            return 0
        count = 0
        if not self._loader.in_flight and (lease is None or not lease.waiting):
            keys = self._residency.keys[layer]
            protected = {keys[expert] for expert in experts} | self._pinned_keys()
            count = self._residency.make_room(len(wanted), protected)
        if count:
            batch = sorted(wanted[:count])
            slots = self._residency.take(layer, batch)
            self._table.guessed.update(slots)
            self._counters.guesses.begun([keys[expert] for expert in batch], self._residency.left)
            self._loader.start(layer, batch, slots, guessed=True)
        self._counters.dropped += len(wanted) - count
        return count

    def absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those of `experts` that are neither here nor on their way."""
        return missing(self._table.where[layer], experts)

    def time_reads(self, most_s: float) -> list[float]:
        """Seconds that a slot takes to be filled, a few times (speed.py). Raises ReadFailed."""
        if self._host is not None:
            return self._host.time_fills(most_s)
        return time_reads(self._pack, most_s)

    def record(self, trace: TraceWriter | None) -> None:
        """Writes every layer event from now on into `trace`, or into none; the caller closes it."""
        self._trace = trace

    def stats(self) -> CacheStats:
        """A snapshot. `loaded_bytes` counts whole strides: what was read, padding included."""
        counters, plan = self._counters, self._plan
        return CacheStats(
            layers=tuple(
                LayerStats(
                    name=layer.name,
                    hits=counters.hits[index],
                    prefetch_hits=counters.prefetch_hits[index],
                    misses=counters.misses[index],
                    evictions=counters.evictions[index],
                    computed_below=counters.computed_below[index],
                )
                for index, layer in enumerate(self._pack.spec.layers)
            ),
            demand_loads=counters.demand.loads,
            prefetch_loads=counters.prefetch.loads,
            demand_bytes=counters.demand.bytes,
            prefetch_bytes=counters.prefetch.bytes,
            prefetches_used=counters.used,
            prefetches_late=counters.late,
            prefetches_wasted=counters.wasted,
            prefetches_dropped=counters.dropped,
            prefetch_rereads=counters.guesses.rereads,
            prefetch_head_start_s=counters.guesses.head_start_s,
            prefetch_behind_s=counters.guesses.behind_s,
            demand_read_s=counters.demand.read_s,
            prefetch_read_s=counters.prefetch.read_s,
            prefill_stall_s=counters.prefill_stall_s,
            decode_stall_s=counters.decode_stall_s,
            slots=plan.slots,
            slots_used=self._table.used,
            slot_bytes=plan.slot_bytes,
            capacity_bytes=plan.capacity_bytes,
            used_bytes=self._table.used * plan.slot_bytes + plan.staging_bytes,
            host=None if self._host is None else self._host.stats(),
        )

    def check(self) -> None:
        """Raises AssertionError, with the sums, where two views of the truth differ."""
        self._table.check()
        self._check_users()
        self._check_counters()
        passing, most = len(self._table.passing), self._residency.stream_slots
        agree("passing experts beyond their share, none", max(0, passing - most), 0)
        if self._host is not None:
            self._host.check()

    def close(self) -> None:
        """Waits for a read under way; the views of all leases are void. Idempotent."""
        self._loader.close()
        self._pack.close()

    def _open_lease(self) -> Lease | None:
        return self._lease if self._lease is not None and self._lease.open else None

    def _pinned_keys(self) -> set[ExpertKey]:
        table = self._table
        return {key for slot in table.pinned if (key := table.keys[slot]) is not None}

    def _check_users(self) -> None:
        table, lease = self._table, self._open_lease()
        held = {key for key in table.keys if key is not None}
        kept = held - {table.keys[slot] for slot in table.passing}
        agree(
            "keys of the policy, keys with a slot that do not pass", set(self._policy.keys()), kept
        )
        agree("keys of the policy, counted", len(self._policy.keys()), len(kept))
        agree("slots being read into, LOADING slots", self._loader.moving, table.loading)
        coming = set() if lease is None else set(lease.coming)
        agree("awaited slots that are not LOADING, none", coming - table.loading, set())
        pinned_by = set() if lease is None else lease.held
        agree("pinned slots, slots of the open lease", table.pinned, pinned_by)

    def _check_counters(self) -> None:
        counters, table, lease = self._counters, self._table, self._open_lease()
        asked = [
            sum(three)
            for three in zip(counters.hits, counters.prefetch_hits, counters.misses, strict=True)
        ]
        agree("hits + misses per layer, requests", asked, counters.requested)
        waiting = 0 if lease is None else lease.waiting
        accounted = counters.demand.started + counters.late + waiting + counters.abandoned
        accounted += sum(counters.computed_below)
        what = "misses, reads started + late + waiting + abandoned + computed below"
        agree(what, sum(counters.misses), accounted)
        moving = counters.demand.moving + counters.prefetch.moving
        agree("reads moving, LOADING slots", moving, len(table.loading))
        fate = counters.used + counters.late + counters.wasted + len(table.guessed)
        agree("prefetches, used + late + wasted + unasked", counters.prefetch.started, fate)
        loads = counters.demand.loads + counters.prefetch.loads
        agree("loads - evictions, READY slots", loads - sum(counters.evictions), sum(table.ready))
        agree("loads, loads by layer", loads, sum(counters.loads))
        read = counters.demand.bytes + counters.prefetch.bytes
        agree("bytes, loads x stride", read, self._loader.loaded_bytes)
