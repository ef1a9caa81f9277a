"""Names for what the cache holds. Knows no tensors, no requests.

A *layer* here is the position of an experts module in the pack, counted from 0 in the order in
which the model runs them; the pack header keeps the module path of each.
"""

from enum import Enum
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """One expert of one experts module."""

    layer: int
    expert: int


class Routed(NamedTuple):
    """How a prompt's tokens chose among the experts that an event asks for."""

    tokens: int
    counts: tuple[int, ...]  # tokens that chose each expert, in the order of the event


class Phase(Enum):
    """What kind of step asks: prompt tokens (prefill) or one token per sequence (decode)."""

    PREFILL = "prefill"
    DECODE = "decode"


class SlotState(Enum):
    """FREE -> LOADING -> READY -> FREE; LOADING -> FREE when a read fails. Nothing else."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"
