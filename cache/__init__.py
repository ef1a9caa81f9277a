"""Where expert weights are and who may stay. Knows no request, no token, no HTTP."""

from .cuda_link import STAGING_BYTES, cuda
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
from .lease import Lease, Stay
from .link import Copied, Copy, EmulatedLink, Link, LinkSpec
from .pack import Pack
from .pack_build import PackWriter, open_or_build
from .plan import (
    LEAST_HOST_SLOTS,
    CacheConfig,
    HostMode,
    SlotPlan,
    TierPlan,
    plan_slots,
    plan_tiers,
)
from .policy import Lru, PerLayer, Policy
from .replayer import LayerReplay, Replayed, belady, replay, replay_events
from .stats import CacheStats, LayerStats, LinkStats, TierStats
from .tensor_file import read_tensors, write_tensors
from .tracefile import LiveCount, TraceEvent, TraceHeader, TraceLayer, TraceReader, TraceWriter
from .transfer import Completion, DirectReader, Reader, ReadRequest
from .two_tiers import two_tiers
from .units import human_bytes
from .wiring import Wiring, emulated

__all__ = [
    "LEAST_HOST_SLOTS",
    "STAGING_BYTES",
    "BlobLayout",
    "CacheConfig",
    "CacheError",
    "CacheStats",
    "Completion",
    "Copied",
    "Copy",
    "DecayedFrequency",
    "DirectReader",
    "DoesNotFit",
    "EmulatedLink",
    "ExpertCache",
    "ExpertKey",
    "HostMode",
    "LayerReplay",
    "LayerStats",
    "Lease",
    "Link",
    "LinkSpec",
    "LinkStats",
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
    "Stay",
    "TensorSpec",
    "TierPlan",
    "TierStats",
    "TraceEvent",
    "TraceHeader",
    "TraceInvalid",
    "TraceLayer",
    "TraceReader",
    "TraceWriter",
    "Wiring",
    "belady",
    "cuda",
    "emulated",
    "human_bytes",
    "open_or_build",
    "plan_slots",
    "plan_tiers",
    "read_tensors",
    "replay",
    "replay_events",
    "two_tiers",
    "write_tensors",
]
