"""What one step tells about one sequence. No tensors."""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens
    ABORT = "abort"  # the client went away
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one finished request; `prefill_s` ends with the first token."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's natural log probability, and those of the most likely ones in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # largest first


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step gave one sequence. `text` never splits a character or leaks a stop string."""

    text: str
    token_ids: tuple[int, ...]  # generated in this step (stop tokens included)
    finish_reason: FinishReason | None = None
    timings: Timings | None = None  # with the last event
    error: str | None = None  # with FinishReason.ERROR, which ends all answers of the request
    index: int = 0  # of the answer
    token_texts: tuple[str, ...] = ()  # of each token: nothing held back, no stop string cut off
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each of `token_ids`, if asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of prompt tokens from the second on, once
