"""How the sequences of one step go through the model: all in one row, or one after the other."""

from .choice import choose_lane, packed_lane
from .lane import LanePart, PassLane
from .packed import PackedLane, last_rows
from .scoring import HeldStates
from .sequential import SequentialLane

__all__ = [
    "HeldStates",
    "LanePart",
    "PackedLane",
    "PassLane",
    "SequentialLane",
    "choose_lane",
    "last_rows",
    "packed_lane",
]
