"""How the sequences of one step go through a model, and why so."""

from dataclasses import dataclass
from enum import Enum


class Lane(Enum):
    PACKED = "packed"  # all in one row
    SEQUENTIAL = "sequential"  # one after the other, each with the cache of the model's own class


@dataclass(frozen=True, slots=True)
class LaneChoice:
    lane: Lane
    reason: str = ""  # why it is not the packed one

    @property
    def line(self) -> str:
        """For people."""
        if self.lane is Lane.PACKED:
            return "lane: packed, the sequences of a step share one pass"
        return f"lane: sequential, a pass for each sequence of a step ({self.reason})"
