"""Who runs in the next step. Plain Python over lengths and pages; no tensors, no threads.

A request is admitted whole or not at all: the pages of its longest possible KV are taken first,
those of all its answers, so that nothing that runs can ever run out of room. Copies of neurons that
its answers will share take room of the KV, too: whole pages that stay empty. First come, first
served.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from moestro.engine.facts import PAGE_TOKENS, PromptTooLong, QueueFull

from .pages import PagePool, pages_of
from .sequence import Batch, Part, Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_running: int  # sequences in one step
    max_waiting: int  # requests behind them
    max_step_tokens: int  # tokens in one step
    kv_capacity_bytes: int
    kv_bytes_per_token: int
    shares_prompt: bool = True  # answers to one prompt read the pages that it filled
    whole_prompts: bool = False  # a prompt is computed in one step or not at all

    @property
    def page_bytes(self) -> int:
        return PAGE_TOKENS * self.kv_bytes_per_token

    @property
    def pages(self) -> int:
        return self.kv_capacity_bytes // self.page_bytes


CopiesBytes = Callable[[int, float | None], int]
"""Prompt tokens and density of a request -> what it will keep in copies of neurons."""


def no_copies(prompt_tokens: int, density: float | None) -> int:
    """Of a model where nothing is copied."""
    return 0


class Scheduler:
    """waiting -> running -> gone. `remove` works in either state."""

    def __init__(self, limits: SchedulerLimits, copies_bytes: CopiesBytes = no_copies) -> None:
        self.limits = limits
        self._copies_bytes = copies_bytes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.pool = PagePool(limits.pages)

    @property
    def kv_reserved_bytes(self) -> int:
        return self.pool.used_pages * self.limits.page_bytes

    def refuse_when_full(self, more: int = 0) -> None:
        """Raises QueueFull where `more` requests on their way would not find room."""
        waiting = len(self.waiting) + more
        if waiting >= self.limits.max_waiting:
            raise QueueFull(f"{waiting} requests wait already; try again later")

    def refuse_what_never_fits(self, sequence: Sequence) -> None:
        """Raises PromptTooLong; touches nothing that changes, so any thread may call it."""
        most = self.limits.max_step_tokens
        if self.limits.whole_prompts and sequence.prompt_tokens > most:
            raise PromptTooLong(
                f"the prompt has {sequence.prompt_tokens} tokens; this model's prompts are computed"
                f" whole, and a step takes {most} (--max-step-tokens)"
            )
        need = self._need_pages(sequence)
        if need > self.pool.pages:
            answers = f" for {sequence.params.n} answers" if sequence.params.n > 1 else ""
            page_bytes, copies = self.limits.page_bytes, self._copies_pages(sequence)
            words = f", {copies * page_bytes} of them for copies of neurons (a smaller density of"
            words += " experts takes less, mode token none)"
            raise PromptTooLong(
                f"the request needs {need * page_bytes} bytes of KV{answers}, there are"
                f" {self.limits.kv_capacity_bytes}{words if copies else ''}"
            )

    def most_new_tokens(self, prompt_tokens: int, n: int, density: float | None = None) -> int:
        """The largest max_tokens with which `n` answers to such a prompt can be admitted."""
        shared = prompt_tokens // PAGE_TOKENS if self.limits.shares_prompt else 0
        pages = self.pool.pages - self._pages_of_bytes(self._copies_bytes(prompt_tokens, density))
        each = (pages + (n - 1) * shared) // n
        return max(0, each * PAGE_TOKENS - prompt_tokens + 1)

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull or, for what could never be admitted, PromptTooLong; changes nothing."""
        self.refuse_what_never_fits(sequence)
        self.refuse_when_full()
        self.waiting.append(sequence)

    def next_batch(self) -> Batch:
        """Decoding sequences first, one token each; the rest of the step goes to prompts."""
        self._admit()
        room = self.limits.max_step_tokens
        parts: dict[tuple[int, int], Part] = {}
        decoding = [s for s in self.running if s.pending_tokens == 1]
        prompts = [s for s in self.running if s.pending_tokens > 1]
        if self.limits.whole_prompts:  # one of them a step, whatever decodes beside it
            prompts = prompts[:1]
            room += sum(sequence.pending_tokens for sequence in prompts)
        for sequence in decoding + prompts:
            tokens = min(sequence.pending_tokens, room)
            if tokens > 0:
                parts[sequence.key] = Part(sequence, tokens)
                room -= tokens
        return Batch(tuple(parts[s.key] for s in self.running if s.key in parts))

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """The other answers to a prompt that is computed; they run from now on.

        The whole pages of the prompt are shared, the others are those that admission took.
        """
        shared = sequence.pages[: self._shared_pages(sequence)]
        twins = []
        for index, own in enumerate(sequence.pages_of_forks, 1):
            twin = sequence.fork(index)
            twin.pages = self.pool.share(shared) + own
            twin.pages_of_copies = self.pool.share(sequence.pages_of_copies)
            twins.append(twin)
        sequence.pages_of_forks = []
        self.running += twins
        return twins

    def remove(self, sequence: Sequence) -> None:
        """Let `sequence` go and give its room back."""
        if sequence in self.running:
            self.running.remove(sequence)
            for pages in _all_pages(sequence):
                self.pool.release(pages)
            sequence.pages, sequence.pages_of_forks, sequence.pages_of_copies = [], [], []
        else:
            self.waiting.remove(sequence)

    def check(self) -> None:
        """The pages of those that run are the ones in use, and enough for them."""
        self.pool.check([pages for s in self.running for pages in _all_pages(s)])
        assert all(len(s.pages) == pages_of(s.capacity_tokens) for s in self.running)
        assert all(len(s.pages_of_copies) == self._copies_pages(s) for s in self.running)
        assert self._places_taken() <= self.limits.max_running

    def _admit(self) -> None:
        while self.waiting:
            first = self.waiting[0]
            if self._places_taken() + first.params.n > self.limits.max_running:
                return
            if self._need_pages(first) > self.pool.free_pages:
                return
            self.running.append(self.waiting.popleft())
            first.pages = self.pool.take(pages_of(first.capacity_tokens))
            own = len(first.pages) - self._shared_pages(first)
            first.pages_of_forks = [self.pool.take(own) for _ in range(first.params.n - 1)]
            first.pages_of_copies = self.pool.take(self._copies_pages(first))

    def _places_taken(self) -> int:
        return sum(1 + len(sequence.pages_of_forks) for sequence in self.running)

    def _shared_pages(self, sequence: Sequence) -> int:
        """Pages that the prompt fills: all answers read them, none writes into them."""
        return sequence.prompt_tokens // PAGE_TOKENS if self.limits.shares_prompt else 0

    def _need_pages(self, sequence: Sequence) -> int:
        each = pages_of(sequence.capacity_tokens)
        forks = (sequence.params.n - 1) * (each - self._shared_pages(sequence))
        return each + forks + self._copies_pages(sequence)

    def _copies_pages(self, sequence: Sequence) -> int:
        density = sequence.params.expert_density
        return self._pages_of_bytes(self._copies_bytes(sequence.prompt_tokens, density))

    def _pages_of_bytes(self, size_bytes: int) -> int:
        return -(-size_bytes // self.limits.page_bytes)


def _all_pages(sequence: Sequence) -> tuple[list[int], ...]:
    return sequence.pages, *sequence.pages_of_forks, sequence.pages_of_copies
