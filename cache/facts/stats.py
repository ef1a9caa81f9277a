"""Counters of the cache, as frozen snapshots. Knows no Prometheus.

hits + prefetch_hits + misses = distinct experts requested, per layer: one layer of one step is one
event. A prefetch that has not arrived when its expert is asked for is a miss (and counted `late`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Lookups of one experts module since start."""

    name: str  # module path, as in the pack header
    hits: int
    prefetch_hits: int
    misses: int
    evictions: int
    computed_below: int = 0  # misses that were computed with where they lay, in the tier below

    @property
    def lookups(self) -> int:
        return self.hits + self.prefetch_hits + self.misses


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What the link between two tiers carried."""

    name: str  # says so when it is emulated
    emulated: bool  # the figures are a clock's, not a wire's
    copies: int
    copied_bytes: int
    chunks: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class TierStats:
    """The host tier below the device's slots. hits + misses = experts that the device missed."""

    mode: str  # HostMode.value
    hits: int
    misses: int
    evictions: int
    demand_reads: int  # experts read from the pack
    prefetch_reads: int
    demand_bytes: int
    prefetch_bytes: int
    demand_read_s: float  # time reader threads spent
    prefetch_read_s: float
    slots: int
    slots_used: int
    slot_bytes: int
    capacity_bytes: int
    used_bytes: int
    link: LinkStats

    @property
    def read_bytes(self) -> int:
        return self.demand_bytes + self.prefetch_bytes


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Everything the cache counts. Seconds are wall clock, bytes are what was moved into its slots:

    from the pack, or, where there is a host tier, from that one, whose own figures are `host`.
    """

    layers: tuple[LayerStats, ...]
    demand_loads: int
    prefetch_loads: int
    demand_bytes: int
    prefetch_bytes: int
    prefetches_used: int  # arrived before they were asked for
    prefetches_late: int  # asked for while still moving
    prefetches_wasted: int  # evicted (or failed) without ever being asked for
    prefetches_dropped: int  # guessed but not started: link busy, nothing evictable
    prefetch_rereads: int  # read again soon after they had left for a guess that was wrong
    prefetch_head_start_s: float  # how long late ones were under way when they were asked for
    prefetch_behind_s: float  # demanded reads waited for a guessed one that nobody asked for
    demand_read_s: float  # time reader threads (with a host tier: the link) spent on demands
    prefetch_read_s: float
    prefill_stall_s: float  # time the compute thread waited for experts
    decode_stall_s: float
    slots: int
    slots_used: int
    slot_bytes: int
    capacity_bytes: int
    used_bytes: int
    host: TierStats | None = None  # None: the slots are filled from the pack

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def prefetch_hits(self) -> int:
        return sum(layer.prefetch_hits for layer in self.layers)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.layers)

    @property
    def lookups(self) -> int:
        return self.hits + self.prefetch_hits + self.misses

    @property
    def loads(self) -> int:
        return self.demand_loads + self.prefetch_loads

    @property
    def loaded_bytes(self) -> int:
        return self.demand_bytes + self.prefetch_bytes
