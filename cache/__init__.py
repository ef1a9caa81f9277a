"""Where expert weights are and who may stay. Knows no request, no token, no HTTP."""

from .errors import (
    CacheError,
    DoesNotFit,
    NoDiskSpace,
    PackInvalid,
    PackUnwritable,
    ReadFailed,
    TraceInvalid,
)
from .expert_cache import ExpertCache
from .frequency import DecayedFrequency, NextUse
from .keys import ExpertKey, Phase, Routed, SlotState
from .layout import BlobLayout, PackLayer, PackSpec, TensorSpec
from .lease import Lease
from .pack import Pack
from .pack_build import PackWriter, open_or_build
from .plan import CacheConfig, SlotPlan, plan_slots
from .policy import Lru, PerLayer, Policy
from .replayer import LayerReplay, Replayed, belady, replay, replay_events
from .stats import CacheStats, LayerStats
from .tracefile import (
    LiveCount,
    TraceEvent,
    TraceHeader,
    TraceLayer,
    TraceReader,
    TraceWriter,
)
from .transfer import Completion, DirectReader, Reader, ReadRequest
from .units import human_bytes

__all__ = [
    "BlobLayout",
    "CacheConfig",
    "CacheError",
    "CacheStats",
    "Completion",
    "DecayedFrequency",
    "DirectReader",
    "DoesNotFit",
    "ExpertCache",
    "ExpertKey",
    "LayerReplay",
    "LayerStats",
    "Lease",
    "LiveCount",
    "Lru",
    "NextUse",
    "NoDiskSpace",
    "Pack",
    "PackInvalid",
    "PackLayer",
    "PackSpec",
    "PackUnwritable",
    "PackWriter",
    "PerLayer",
    "Phase",
    "Policy",
    "ReadFailed",
    "ReadRequest",
    "Reader",
    "Replayed",
    "Routed",
    "SlotPlan",
    "SlotState",
    "TensorSpec",
    "TraceEvent",
    "TraceHeader",
    "TraceInvalid",
    "TraceLayer",
    "TraceReader",
    "TraceWriter",
    "belady",
    "human_bytes",
    "open_or_build",
    "plan_slots",
    "replay",
    "replay_events",
]
