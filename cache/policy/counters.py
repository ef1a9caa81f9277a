"""What the cache counts while it works; stats.py has the frozen picture of it."""

from dataclasses import dataclass, field

from moestro.cache.facts import Phase

from .guesses import GuessLedger


@dataclass(slots=True)
class LinkCounters:
    """Experts moved for one reason: demanded, or guessed. started = loads + failed + moving."""

    started: int = 0
    loads: int = 0  # arrived whole
    failed: int = 0
    bytes: int = 0  # of the loads
    read_s: float = 0.0

    @property
    def moving(self) -> int:
        return self.started - self.loads - self.failed


@dataclass(slots=True)
class Counters:
    """Lists are per layer."""

    layers: int
    requested: list[int] = field(init=False)
    hits: list[int] = field(init=False)
    prefetch_hits: list[int] = field(init=False)
    misses: list[int] = field(init=False)
    evictions: list[int] = field(init=False)
    loads: list[int] = field(init=False)
    computed_below: list[int] = field(init=False)  # missed, and computed with in the tier below
    demand: LinkCounters = field(default_factory=LinkCounters)
    prefetch: LinkCounters = field(default_factory=LinkCounters)
    used: int = 0
    late: int = 0
    wasted: int = 0
    dropped: int = 0
    abandoned: int = 0  # missed, but the lease was left before their read was started
    prefill_stall_s: float = 0.0
    decode_stall_s: float = 0.0
    guesses: GuessLedger = field(init=False)

    def __post_init__(self) -> None:
        each = (
            "requested",
            "hits",
            "prefetch_hits",
            "misses",
            "evictions",
            "loads",
            "computed_below",
        )
        for name in each:
            setattr(self, name, [0] * self.layers)
        self.guesses = GuessLedger(self.layers)

    def stalled(self, phase: Phase, seconds: float) -> None:
        if phase is Phase.PREFILL:
            self.prefill_stall_s += seconds
        else:
            self.decode_stall_s += seconds
