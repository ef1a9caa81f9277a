"""The memory plan and what to expect of it, before anything is loaded."""

from .advice import Change, changes, flags_of, nearest_plan
from .blueprint import Blueprint, check_config, compact_modules, inspect, kept_dense, understand
from .budgets import plan_memory
from .calibrate import Matrices, measure_link, measure_multiply
from .card import PCIE_4_BYTES_PER_S, CardBound, CardForecast, CardLinks, CardOutlook, FormatShare
from .forecast import (
    Bound,
    ComputeSpeed,
    Forecast,
    LinkSpeed,
    MoeLayer,
    Outlook,
    Rates,
    Traced,
    Work,
)
from .gains import DEMO_PERPLEXITY, Gains
from .limits import HostMemory
from .memory import MemoryPlan, release_freed_memory, trim_heap
from .own_grid import own_grid_line
from .sketch import Sketch, StoredWeights, weights_are_here
from .token_reads import gains_of

__all__ = [
    "DEMO_PERPLEXITY",
    "Blueprint",
    "Bound",
    "CardBound",
    "CardForecast",
    "CardLinks",
    "CardOutlook",
    "Change",
    "ComputeSpeed",
    "Forecast",
    "FormatShare",
    "Gains",
    "HostMemory",
    "LinkSpeed",
    "Matrices",
    "MemoryPlan",
    "MoeLayer",
    "Outlook",
    "PCIE_4_BYTES_PER_S",
    "Rates",
    "Sketch",
    "StoredWeights",
    "Traced",
    "Work",
    "changes",
    "check_config",
    "compact_modules",
    "flags_of",
    "gains_of",
    "inspect",
    "kept_dense",
    "measure_link",
    "measure_multiply",
    "nearest_plan",
    "own_grid_line",
    "plan_memory",
    "release_freed_memory",
    "trim_heap",
    "understand",
    "weights_are_here",
]
