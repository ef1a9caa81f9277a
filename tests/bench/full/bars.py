"""The bars of `make bench-full`, and the arithmetic that says whether one is met. No tensors."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .geometry import Geometry

DENSE_WIDTHS = {"native": 2.0, "int8": 1.0}  # bytes per weight that is read


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise: `figure` must reach `wanted` (or stay below it), both in `unit`."""

    name: str  # "P1 int8 decode against llama.cpp Q8_0"
    figure: float
    wanted: float
    unit: str = "x"
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.figure <= self.wanted if self.at_most else self.figure >= self.wanted

    def line(self) -> str:
        sign = "<=" if self.at_most else ">="
        verdict = "met" if self.met else "MISSED"
        return f"{self.name}: {self.figure:.4g} {self.unit} (bar {sign} {self.wanted:g}): {verdict}"

    def row(self) -> dict[str, Any]:
        return {
            "bar": self.name,
            "figure": self.figure,
            "wanted": self.wanted,
            "unit": self.unit,
            "at_most": self.at_most,
            "met": self.met,
        }


def ratio_bar(name: str, ours: float, peer: float, wanted: float) -> Bar:
    """Ours over the peer's, both in the same unit, more being better."""
    return Bar(name, ours / peer, wanted)


def share_bar(name: str, figure: float, ceiling: float, wanted_percent: float) -> Bar:
    """`figure` as a share of what is possible, in percent."""
    return Bar(name, 100 * figure / ceiling, wanted_percent, "% of the ceiling")


@dataclass(frozen=True, slots=True)
class Link:
    """A slower tier: bytes per second, and seconds before the first byte of each transfer."""

    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, moved_bytes: float, transfers: float = 0) -> float:
        return moved_bytes / self.bytes_per_s + transfers * self.latency_s


def bound_s(compute_s: float, moved_bytes: float, link: Link, transfers: float = 0) -> float:
    """The least a step can take: its products and its transfers, each hiding the other."""
    return max(compute_s, link.seconds(moved_bytes, transfers))


def expected_distinct(experts: int, per_token: int, tokens: int) -> float:
    """Of evenly routed tokens, the distinct experts of one layer: E (1 - (1 - k / E) ** T)."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def rows_per_expert(experts: int, per_token: int, tokens: int) -> float:
    """Mean rows of an expert that has any, evenly routed."""
    return tokens * per_token / expected_distinct(experts, per_token, tokens)


def decode_bytes(shape: Geometry, slot_bytes: int, dense: str) -> float:
    """What one token's step reads: its experts as they lie in their slots, and the dense part."""
    experts = shape.layers * shape.experts_per_token * slot_bytes
    return experts + shape.active_dense_numbers * DENSE_WIDTHS[dense]


def gain(one: float, more: float) -> float:
    """Of more threads over one, both as speeds."""
    return more / one


def medians(rows: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Median of each column over alternating turns; a column that a turn lacks is left out."""
    names = [n for n in rows[0] if all(row.get(n) is not None for row in rows)] if rows else []
    return {name: statistics.median([float(row[name] or 0) for row in rows]) for name in names}
