"""Turns a batch into passes of the model's lane, and their rows into logits and scores."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from moestro.cache import Phase
from moestro.engine.facts import TorchThreads
from moestro.engine.lanes import HeldStates, LanePart, PassLane
from moestro.engine.model import StepPhase
from moestro.engine.selection import PartRows, SequenceExperts

from .events import TokenLogprob
from .logprobs import of_rows
from .sequence import Batch, Part, Sequence


@dataclass(frozen=True, slots=True)
class Ran:
    """What one pass gave."""

    logits: torch.Tensor  # [n, V] fp32, of the parts that end their pending tokens, in batch order
    # by Sequence.key: of the prompt tokens that this pass could tell, where they are asked for
    prompt_logprobs: dict[tuple[int, int], list[TokenLogprob]] = field(default_factory=dict)


class Runner:
    """Runs a batch through the model's lane. `run` commits; `forget` frees."""

    def __init__(
        self,
        lane: PassLane,
        step: StepPhase,
        head_rows: int,
        threads: TorchThreads,
        selection: SequenceExperts | None,
    ) -> None:
        """`head_rows`: rows of logits that the memory plan has room for.

        `selection`: None where a sequence cannot have experts of its own.
        """
        self.lane = lane
        self.selection = selection
        self._step = step
        self._head_rows = head_rows
        self._threads = threads

    def run(self, batch: Batch) -> Ran:
        """On the host: a device is waited for here, before anything counts as computed.

        Either every sequence of the batch is advanced, or (on an exception) none is, and those of a
        lane that does not pack are of no further use.
        """
        passes = [batch.parts] if self.lane.packs else [(part,) for part in batch.parts]
        ran = [self._pass(parts) for parts in passes]
        for part in batch.parts:
            part.sequence.computed_tokens += part.tokens
        scores = {key: found for one in ran for key, found in one.prompt_logprobs.items()}
        logits = [one.logits for one in ran]
        return Ran(logits[0] if len(ran) == 1 else torch.cat(logits), scores)

    def fork(self, sequence: Sequence, twins: Collection[Sequence]) -> None:
        """Each of `twins` goes on from where `sequence` is, on pages of its own."""
        with torch.inference_mode():
            self.lane.fork(sequence.key, [(twin.key, twin.pages) for twin in twins])
        if self.selection is not None:
            self.selection.fork(sequence.key, [twin.key for twin in twins])

    def forget(self, sequence: Sequence) -> None:
        self.lane.forget(sequence.key)
        if self.selection is not None:
            self.selection.forget(sequence.key)

    @property
    def held_sequences(self) -> int:
        return self.lane.held_sequences

    def _pass(self, parts: tuple[Part, ...]) -> Ran:
        given, keep, end = [], [], 0
        for part in parts:
            sequence, first = part.sequence, part.sequence.computed_tokens
            ids = sequence.token_ids[first : first + part.tokens]
            if first == 0 and sequence.pages_of_copies:
                self.lane.give_back(sequence.pages_of_copies)
            given.append(LanePart(sequence.key, sequence.pages, ids, first))
            end += part.tokens
            if part.ends_pending:
                keep.append(end - 1)
        self._threads.settle(end)
        batch = Batch(parts)
        self._step.phase = Phase.PREFILL if batch.is_prefill else Phase.DECODE
        scoring = any(part.scored_tokens for part in parts)
        model = self.lane.model
        with torch.inference_mode(), HeldStates(model) if scoring else nullcontext() as held:
            with self._selecting(parts):
                logits = self.lane.run(given, keep or [end - 1]).cpu()
            scores = {} if held is None else self._score(batch, held)
        return Ran(logits if keep else logits[:0], scores)

    @contextmanager
    def _selecting(self, parts: tuple[Part, ...]) -> Iterator[None]:
        """The pass inside looks at the prompts, and keeps to the experts, of who wants it."""
        if self.selection is None:
            yield
            return
        rows = [part_rows(part) for part in parts]
        self._step.rows = self.selection.begin(rows)
        try:
            yield
        finally:
            self._step.rows = None
        self.selection.end(rows)

    def _score(self, batch: Batch, held: HeldStates) -> dict[tuple[int, int], list[TokenLogprob]]:
        found: dict[tuple[int, int], list[TokenLogprob]] = {}
        start = 0
        for part in batch.parts:
            if part.scored_tokens:
                found[part.sequence.key] = self._score_part(part, start, held)
            start += part.tokens
        return found

    def _score_part(self, part: Part, start: int, held: HeldStates) -> list[TokenLogprob]:
        """Row i of the part tells the token behind it. A block of rows at a time."""
        first = part.sequence.computed_tokens + 1
        said = part.sequence.token_ids[first : first + part.scored_tokens]
        count = part.sequence.params.prompt_logprobs or 0
        scores: list[TokenLogprob] = []
        for at in range(0, len(said), self._head_rows):
            ids = said[at : at + self._head_rows]
            logits = held.logits([start + at + i for i in range(len(ids))])
            scores += of_rows(logits, ids, count)
        return scores


def part_rows(part: Part) -> PartRows:
    sequence = part.sequence
    return PartRows(
        sequence.key,
        sequence.computed_tokens,
        part.tokens,
        sequence.prompt_tokens,
        sequence.params.expert_density,
    )
