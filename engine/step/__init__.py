"""One step of many sequences: schedule, run, sample, commit."""

from .core import Emitted, Engine
from .events import FinishReason, Timings, TokenEvent, TokenLogprob
from .params import MOST_BIAS, MOST_LOGPROBS, SamplingParams
from .runner import Runner
from .sampler import Sampler
from .scheduler import Scheduler, SchedulerLimits, no_copies
from .sequence import Batch, Part, Sequence

__all__ = [
    "MOST_BIAS",
    "MOST_LOGPROBS",
    "Batch",
    "Emitted",
    "Engine",
    "FinishReason",
    "Part",
    "Runner",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerLimits",
    "Sequence",
    "Timings",
    "TokenEvent",
    "TokenLogprob",
    "no_copies",
]
