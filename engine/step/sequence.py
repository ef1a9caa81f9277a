"""One request inside the engine: its parameters, its three lengths, its events. No tensors.

0            computed_tokens          len(token_ids)
|-- in the KV ------|-- still to run ------|
|-- prompt_tokens ----------|-- generated --|
"""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import Enum

from moestro.engine.facts import round_up_tokens

from .params import SamplingParams


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
class TokenEvent:
    """What one step gave one sequence. `text` never splits a character or leaks a stop string."""

    text: str
    token_ids: tuple[int, ...]  # generated in this step (stop tokens included)
    finish_reason: FinishReason | None = None
    timings: Timings | None = None  # with the last event
    error: str | None = None  # with FinishReason.ERROR


class Sequence:
    """What the scheduler moves around. Three lengths are stored, the rest are properties."""

    def __init__(self, number: int, prompt_ids: Ids[int], params: SamplingParams) -> None:
        self.number = number
        self.params = params
        self.token_ids = list(prompt_ids)
        self.prompt_tokens = len(self.token_ids)
        self.computed_tokens = 0
        self.times = Times()

    @property
    def pending_tokens(self) -> int:
        """Tokens that are known but not in the KV yet: 1 while decoding."""
        return len(self.token_ids) - self.computed_tokens

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def capacity_tokens(self) -> int:
        """Room that its KV needs at the longest, rounded up; the last token is never run."""
        return round_up_tokens(self.prompt_tokens + self.params.max_tokens - 1)


@dataclass(slots=True)
class Times:
    """Monotonic clock readings of one sequence, filled in as it moves."""

    submitted_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    def timings(self) -> Timings:
        """A phase that was never reached takes no time."""
        admitted = self.admitted_s or self.finished_s
        first = self.first_token_s or self.finished_s
        return Timings(admitted - self.submitted_s, first - admitted, self.finished_s - first)


@dataclass(frozen=True, slots=True)
class Part:
    """`tokens` pending tokens of one sequence, to be run in one step."""

    sequence: Sequence
    tokens: int

    @property
    def ends_pending(self) -> bool:
        """After this part the sequence gets its next token."""
        return self.tokens == self.sequence.pending_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work, in packed order."""

    parts: tuple[Part, ...] = field(default=())

    @property
    def is_prefill(self) -> bool:
        """Some sequence runs prompt tokens, and not just the one that every step runs."""
        return any(part.tokens > 1 for part in self.parts)
