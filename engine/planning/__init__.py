"""The memory plan, before anything is loaded."""

from .blueprint import Blueprint, check_config, compact_modules, inspect, kept_dense, understand
from .budgets import plan_memory
from .limits import HostMemory
from .memory import Demand, MemoryPlan, release_freed_memory, trim_heap
from .sketch import Sketch, StoredWeights, weights_are_here

__all__ = [
    "Blueprint",
    "Demand",
    "HostMemory",
    "MemoryPlan",
    "Sketch",
    "StoredWeights",
    "check_config",
    "compact_modules",
    "inspect",
    "kept_dense",
    "plan_memory",
    "release_freed_memory",
    "trim_heap",
    "understand",
    "weights_are_here",
]
