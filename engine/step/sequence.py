"""One request inside the engine: its parameters, its three lengths, its pages. No tensors.

0            computed_tokens          len(token_ids)
|-- in the KV ------|-- still to run ------|
|-- prompt_tokens ----------|-- generated --|
"""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field, replace

from .events import Timings
from .params import SamplingParams


class Sequence:
    """What the scheduler moves around. Three lengths are stored, the rest are properties.

    A request for n answers is one sequence until its prompt is computed, then n: `fork`.
    """

    def __init__(self, number: int, prompt_ids: Ids[int], params: SamplingParams) -> None:
        self.number = number  # of the request
        self.index = 0  # of the answer
        self.params = params
        self.token_ids = list(prompt_ids)
        self.prompt_tokens = len(self.token_ids)
        self.computed_tokens = 0
        self.times = Times()
        self.pages: list[int] = []  # of the KV, while it runs
        self.pages_of_forks: list[list[int]] = []  # taken for answers that are still to come
        self.pages_of_copies: list[int] = []  # as many as copies of neurons take the room of

    @property
    def key(self) -> tuple[int, int]:
        return self.number, self.index

    @property
    def pending_tokens(self) -> int:
        """Tokens that are known but not in the KV yet: 1 while decoding."""
        return len(self.token_ids) - self.computed_tokens

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def capacity_tokens(self) -> int:
        """Room that its KV needs at the longest; the last token is never run."""
        return self.prompt_tokens + max(self.params.max_tokens - 1, 0)

    def fork(self, index: int) -> "Sequence":
        """Answer `index` to the same prompt, as far as this one is. It has no pages yet."""
        twin = Sequence(self.number, self.token_ids, self.params)
        twin.index = index
        twin.prompt_tokens = self.prompt_tokens
        twin.computed_tokens = self.computed_tokens
        twin.times = replace(self.times)
        return twin


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
    def scored_tokens(self) -> int:
        """Prompt tokens whose log probabilities its rows tell, where they are asked for."""
        sequence = self.sequence
        if not sequence.params.scores_prompt:
            return 0
        return max(0, min(self.tokens, sequence.prompt_tokens - 1 - sequence.computed_tokens))

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
