"""From prompt ids to token events. Knows no HTTP, no JSON field, no Prometheus."""

from .advice import Change, changes
from .config import EngineConfig, LinkSpec, Progress, ProgressFn
from .errors import (
    BadParameter,
    BudgetTooSmall,
    Draining,
    EngineError,
    EngineFailed,
    LoadCancelled,
    ModelNotFound,
    ModelRefused,
    NotReady,
    PromptTooLong,
    QueueFull,
    RequestError,
    StartError,
    Unavailable,
)
from .forecast import Bound, Forecast, LinkSpeed, Outlook
from .manifest import MANIFEST_NAME, Manifest
from .mixed import FormatMap, mix_by_trace
from .planner import plan_model
from .sequence import FinishReason, SamplingParams, Timings, TokenEvent
from .stats import (
    CacheStats,
    EngineState,
    EngineStats,
    ModelInfo,
    PrefetchStats,
    RecallStats,
    TierStats,
)
from .tokenizer import Tokenizer
from .tracing import (
    CEILING,
    CURVE_SHARES,
    LivePoint,
    Recorded,
    ReplayRow,
    ReplayTable,
    record_trace,
    replay_trace,
)
from .worker import EngineWorker, TokenStream

__all__ = [
    "CEILING",
    "CURVE_SHARES",
    "MANIFEST_NAME",
    "BadParameter",
    "Bound",
    "BudgetTooSmall",
    "CacheStats",
    "Change",
    "Draining",
    "EngineConfig",
    "EngineError",
    "EngineFailed",
    "EngineState",
    "EngineStats",
    "EngineWorker",
    "FinishReason",
    "Forecast",
    "FormatMap",
    "LinkSpec",
    "LinkSpeed",
    "LivePoint",
    "LoadCancelled",
    "Manifest",
    "ModelInfo",
    "ModelNotFound",
    "ModelRefused",
    "NotReady",
    "Outlook",
    "Progress",
    "PrefetchStats",
    "ProgressFn",
    "PromptTooLong",
    "QueueFull",
    "RecallStats",
    "Recorded",
    "ReplayRow",
    "ReplayTable",
    "RequestError",
    "SamplingParams",
    "StartError",
    "TierStats",
    "Timings",
    "TokenEvent",
    "TokenStream",
    "Tokenizer",
    "Unavailable",
    "changes",
    "mix_by_trace",
    "plan_model",
    "record_trace",
    "replay_trace",
]
