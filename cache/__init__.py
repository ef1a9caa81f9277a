"""Where expert weights are and who may stay. Knows no request, no token, no HTTP."""

from .errors import CacheError, DoesNotFit, NoDiskSpace, PackInvalid, ReadFailed
from .keys import ExpertKey, Phase, SlotState
from .stats import CacheStats, LayerStats

__all__ = [
    "CacheError",
    "CacheStats",
    "DoesNotFit",
    "ExpertKey",
    "LayerStats",
    "NoDiskSpace",
    "PackInvalid",
    "Phase",
    "ReadFailed",
    "SlotState",
]
