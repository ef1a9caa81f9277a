"""What a plan for a GPU is worth: the experts in its slots, and what its links allow.

Pure arithmetic, for cards that are here or only planned for. How fast a card multiplies is not
foretold: bounds are those of the link into it and of the disk behind the host, were both perfectly
overlapped with everything else. Hit rates are those of forecast.py; behind a host tier that does
not hold every expert, the disk brings what neither tier has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moestro.engine.facts import LaneChoice
from moestro.engine.planning import MemoryPlan

from .forecast import MoeLayer, Work, hit_rates

PCIE_4_BYTES_PER_S = 25e9
"""What copies out of pinned memory reach on 16 lanes of PCIe 4. An assumption."""


@dataclass(frozen=True, slots=True)
class CardLinks:
    """What experts come over."""

    into_card_bytes_per_s: float
    into_card_source: str
    disk_bytes_per_s: float
    disk_source: str


@dataclass(frozen=True, slots=True)
class CardBound:
    """One step at one hit rate; no step of `tokens` tokens takes less than `seconds`."""

    tokens: int
    hit_rate: float  # in the card's slots
    link_bytes: float
    link_s: float
    disk_bytes: float
    disk_s: float

    @property
    def seconds(self) -> float:
        return max(self.link_s, self.disk_s)

    @property
    def tokens_per_s(self) -> float | None:
        """None where nothing has to come: neither link nor disk is a bound."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def limit(self) -> Literal["link", "disk", "none"]:
        if not self.seconds:
            return "none"
        return "disk" if self.disk_s > self.link_s else "link"


@dataclass(frozen=True, slots=True)
class CardOutlook:
    """A kind of step: at the low and at the high end of the predicted hit rates."""

    low: CardBound
    high: CardBound


@dataclass(frozen=True, slots=True)
class FormatShare:
    """Another format on the same card."""

    expert_format: str
    share: float | None  # of the experts in slots; None: it does not fit, or cannot be here
    why: str = ""  # where there is none
    refused: bool = False  # the format itself, however much memory there is


@dataclass(frozen=True, slots=True)
class CardForecast:
    """What `moestro serve --device cuda` would do on a card, as far as it can be said."""

    family: str
    stored_dtype: str  # of the experts in the files
    expert_format: str
    dense_format: str
    has_weights: bool
    plan: MemoryPlan
    slots: int  # of the card
    host_slots: int
    slot_bytes: int
    work: Work
    links: CardLinks
    lane: LaneChoice
    formats: tuple[FormatShare, ...]  # the others
    quantized: str | None = None  # what becomes of the experts of a quantized checkpoint
    format_reason: str | None = None  # the line of a format that was to be chosen

    @property
    def resident_share(self) -> float:
        return self.slots / self.work.total_experts

    @property
    def host_holds_all(self) -> bool:
        return self.host_slots >= self.work.total_experts

    @property
    def reached_without_disk(self) -> int:
        """Experts in both tiers together: a small host tier keeps no copies of the card's."""
        total = self.work.total_experts
        return total if self.host_holds_all else min(total, self.slots + self.host_slots)

    @property
    def decode(self) -> CardOutlook:
        """One token of one sequence."""
        return self._outlook(1)

    @property
    def prefill(self) -> CardOutlook:
        """One full chunk of a prompt, each expert brought at most once."""
        return self._outlook(self.work.chunk_tokens)

    def _outlook(self, tokens: int) -> CardOutlook:
        layers = self.work.layers
        here = hit_rates(layers, self.slots, tokens)
        reached = hit_rates(layers, self.reached_without_disk, tokens)
        return CardOutlook(
            self._bound(layers, tokens, here[0], reached[0]),
            self._bound(layers, tokens, here[1], reached[1]),
        )

    def _bound(
        self, layers: Sequence[MoeLayer], tokens: int, here: float, reached: float
    ) -> CardBound:
        asked_bytes = sum(layer.distinct(tokens) * layer.blob_bytes for layer in layers)
        link_bytes, disk_bytes = asked_bytes * (1.0 - here), asked_bytes * (1.0 - reached)
        return CardBound(
            tokens,
            here,
            link_bytes,
            link_bytes / self.links.into_card_bytes_per_s,
            disk_bytes,
            disk_bytes / self.links.disk_bytes_per_s,
        )
