"""Who has a slot and who is evicted. Integers and keys only: no memory, no reads."""

from .counters import Counters, LinkCounters
from .frequency import DecayedFrequency, NextUse
from .host_residency import HostResidency
from .lru import Lru, PerLayer, Policy
from .residency import Residency, missing
from .table import NOWHERE, SlotTable, agree

__all__ = [
    "Counters",
    "DecayedFrequency",
    "HostResidency",
    "LinkCounters",
    "Lru",
    "NOWHERE",
    "NextUse",
    "PerLayer",
    "Policy",
    "Residency",
    "SlotTable",
    "agree",
    "missing",
]
