"""Keys, shapes, slot plans, statistics and errors of the cache. Lowest wing: no file, no memory."""

from .errors import (
    CacheError,
    DeviceFailed,
    DoesNotFit,
    NoDiskSpace,
    PackInvalid,
    PackUnwritable,
    ReadFailed,
    TraceInvalid,
)
from .fields import read_fields
from .keys import ExpertKey, Phase, Routed, SlotState
from .layout import (
    DTYPE_BYTES,
    PAGE_BYTES,
    PLAIN_ORDER,
    BlobLayout,
    PackLayer,
    PackSpec,
    TensorSpec,
    round_up,
)
from .plan import (
    LEAST_HOST_SLOTS,
    CacheConfig,
    HostMode,
    SlotPlan,
    TierPlan,
    plan_slots,
    plan_tiers,
)
from .stats import CacheStats, LayerStats, LinkStats, TierStats
from .units import human_bytes

__all__ = [
    "BlobLayout",
    "CacheConfig",
    "CacheError",
    "CacheStats",
    "DTYPE_BYTES",
    "DeviceFailed",
    "DoesNotFit",
    "ExpertKey",
    "HostMode",
    "LEAST_HOST_SLOTS",
    "LayerStats",
    "LinkStats",
    "NoDiskSpace",
    "PAGE_BYTES",
    "PLAIN_ORDER",
    "PackInvalid",
    "PackLayer",
    "PackSpec",
    "PackUnwritable",
    "Phase",
    "ReadFailed",
    "Routed",
    "SlotPlan",
    "SlotState",
    "TensorSpec",
    "TierPlan",
    "TierStats",
    "TraceInvalid",
    "human_bytes",
    "plan_slots",
    "plan_tiers",
    "read_fields",
    "round_up",
]
