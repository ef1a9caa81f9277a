"""What a plan is worth before anything is loaded: bytes per step, and the speed that they allow.

Pure arithmetic over measured speeds. The results are bounds: a step takes at least as long as its
slower side, link or compute, were both perfectly overlapped and nothing else to do.

Hit rates are for uniform routing, where each token's experts are drawn evenly and independently.
Real routing is skewed and finds more. The low end is what LRU finds: between two visits of a layer
all others pass, so an expert last used j tokens ago is still there if all that j tokens touch fits
into the slots. The high end is the share of experts that is resident, which is what the best choice
without knowledge of the future finds; the cache's own policy comes close to it. A recorded trace,
where there is one, replaces both: replayed as the cache decides, and with perfect foresight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pow
from typing import Literal

from moestro.engine.facts import LaneChoice
from moestro.engine.planning import MemoryPlan

from .gains import Gains

Routing = Literal["uniform", "trace"]  # what hit rates are predicted from
Rates = tuple[float, float]  # low and high predicted share of experts asked for that are found


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One layer of experts, as the arithmetic sees it."""

    num_experts: int
    experts_per_token: int
    blob_bytes: int  # what one load reads
    numbers: int  # weights of one expert that each of its tokens is multiplied with

    def seen(self, tokens: float) -> float:
        """The share of the experts that `tokens` tokens use, on average."""
        return 1.0 - pow(1.0 - self.experts_per_token / self.num_experts, tokens)

    def distinct(self, tokens: float) -> float:
        """How many different experts `tokens` tokens use, on average."""
        return self.num_experts * self.seen(tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """What steps of one model ask for."""

    layers: tuple[MoeLayer, ...]
    dense_numbers: int  # that every token is multiplied with, without the head
    head_numbers: int  # that one token of each sequence and step is multiplied with
    chunk_tokens: int  # of a prefill step

    @property
    def total_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    @property
    def mean_experts_per_token(self) -> float:
        """Over the layers."""
        return sum(layer.experts_per_token for layer in self.layers) / len(self.layers)


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """How fast experts come from the pack."""

    scattered_bytes_per_s: float  # one expert at a time, as decoding reads
    ordered_bytes_per_s: float  # neighbours together, as prefill reads
    source: str  # where the numbers come from, in words


@dataclass(frozen=True, slots=True)
class ComputeSpeed:
    """Multiply-adds per second, for one row (decode) and for as many as a chunk gives."""

    dense_decode: float
    dense_prefill: float
    expert_decode: float
    expert_prefill: float
    threads: int
    products: str  # the instruction set of the library's, or "torch"


@dataclass(frozen=True, slots=True)
class Bound:
    """One step at one hit rate; no step of `tokens` tokens takes less than `seconds`."""

    tokens: int
    hit_rate: float
    link_bytes: float
    link_s: float
    compute_s: float

    @property
    def seconds(self) -> float:
        return max(self.link_s, self.compute_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def limit(self) -> Literal["disk", "compute"]:
        return "disk" if self.link_s > self.compute_s else "compute"


@dataclass(frozen=True, slots=True)
class Outlook:
    """A kind of step: at the low and at the high end of the predicted hit rates."""

    low: Bound
    high: Bound


def hit_rates(layers: Sequence[MoeLayer], slots: int, step_tokens: int) -> Rates:
    """For steps of `step_tokens` tokens, counted over the distinct experts of each step."""
    total = sum(layer.num_experts for layer in layers)
    if slots >= total:
        return 1.0, 1.0
    steps = 0
    while sum(layer.distinct((steps + 1) * step_tokens) for layer in layers) <= slots:
        steps += 1
    asked = [layer.distinct(step_tokens) for layer in layers]
    kept = [layer.seen(steps * step_tokens) for layer in layers]
    low = sum(count * share for count, share in zip(asked, kept, strict=True)) / sum(asked)
    return low, max(low, slots / total)


def decode_outlook(
    work: Work, slots: int, link: LinkSpeed, compute: ComputeSpeed, rates: Rates | None = None
) -> Outlook:
    """One token of one sequence, its context short. `rates`: others than of uniform routing."""
    experts = sum(layer.experts_per_token * layer.numbers for layer in work.layers)
    dense_s = (work.dense_numbers + work.head_numbers) / compute.dense_decode
    compute_s = dense_s + experts / compute.expert_decode
    found = rates or hit_rates(work.layers, slots, 1)
    return _outlook(work.layers, 1, found, link.scattered_bytes_per_s, compute_s)


def prefill_outlook(
    work: Work, slots: int, link: LinkSpeed, compute: ComputeSpeed, rates: Rates | None = None
) -> Outlook:
    """One full chunk of a prompt, each expert read at most once."""
    tokens = work.chunk_tokens
    experts = tokens * sum(layer.experts_per_token * layer.numbers for layer in work.layers)
    compute_s = (
        tokens * work.dense_numbers / compute.dense_prefill
        + work.head_numbers / compute.dense_decode
        + experts / compute.expert_prefill
    )
    found = rates or hit_rates(work.layers, slots, tokens)
    return _outlook(work.layers, tokens, found, link.ordered_bytes_per_s, compute_s)


def _outlook(
    layers: Sequence[MoeLayer], tokens: int, rates: Rates, bytes_per_s: float, compute_s: float
) -> Outlook:
    asked_bytes = sum(layer.distinct(tokens) * layer.blob_bytes for layer in layers)

    def bound(hit_rate: float) -> Bound:
        missing_bytes = asked_bytes * (1.0 - hit_rate)
        return Bound(tokens, hit_rate, missing_bytes, missing_bytes / bytes_per_s, compute_s)

    return Outlook(bound(rates[0]), bound(rates[1]))


@dataclass(frozen=True, slots=True)
class Traced:
    """Hit rates of a recorded run in as many slots as planned; None where it has no such steps."""

    decode: Rates | None
    prefill: Rates | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `moestro serve` would print with the same settings, and bounds on what it would do."""

    family: str
    stored_dtype: str  # of the experts in the files
    expert_format: str
    dense_format: str
    has_weights: bool  # the files were there; otherwise the shapes are the config's
    factorized: bool
    plan: MemoryPlan
    slots: int
    slot_bytes: int
    work: Work
    link: LinkSpeed
    compute: ComputeSpeed
    lane: LaneChoice
    gains: Gains | None  # of smaller formats, where something is native and there are some
    traced: Traced | None = None
    quantized: str | None = None  # what becomes of the experts of a quantized checkpoint
    format_reason: str | None = None  # the line of a format that was to be chosen

    @property
    def holds_all(self) -> bool:
        return self.slots >= self.work.total_experts

    @property
    def resident_share(self) -> float:
        return self.slots / self.work.total_experts

    @property
    def context_tokens(self) -> int:
        """The longest sequence that will be served."""
        return self.plan.longest_tokens

    @property
    def decode(self) -> Outlook:
        rates = self.traced.decode if self.traced else None
        return decode_outlook(self.work, self.slots, self.link, self.compute, rates)

    @property
    def prefill(self) -> Outlook:
        rates = self.traced.prefill if self.traced else None
        return prefill_outlook(self.work, self.slots, self.link, self.compute, rates)

    @property
    def decode_routing(self) -> Routing:
        return "trace" if self.traced and self.traced.decode else "uniform"

    @property
    def prefill_routing(self) -> Routing:
        return "trace" if self.traced and self.traced.prefill else "uniform"

    @property
    def decode_with_all(self) -> Bound:
        """Were every expert resident."""
        return decode_outlook(self.work, self.work.total_experts, self.link, self.compute).high
