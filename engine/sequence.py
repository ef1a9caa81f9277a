"""One request inside the engine: its parameters, its three lengths, its events. No tensors.

    0            computed_tokens          len(token_ids)
    |-- in the KV ------|-- still to run ------|
    |-- prompt_tokens ----------|-- generated --|
"""

import math
from dataclasses import dataclass
from enum import Enum

from .errors import BadParameter


class FinishReason(Enum):
    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens
    ABORT = "abort"  # the client went away
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("stop", all(self.stop), "free of empty strings"),
        )
        for name, holds, rule in checks:
            if not holds:
                raise BadParameter(f"{name} must be {rule}, not {getattr(self, name)!r}", name)
        if not math.isfinite(self.temperature):
            raise BadParameter("temperature must be finite", "temperature")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise BadParameter("seed must fit into 64 bits", "seed")


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one finished request; `prefill_s` ends with the first token."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step gave one sequence. `text` never splits a character or leaks a stop string."""

    text: str
    token_ids: tuple[int, ...]  # generated in this step (stop tokens included)
    finish_reason: FinishReason | None = None
    timings: Timings | None = None  # with the last event
    error: str | None = None  # with FinishReason.ERROR
