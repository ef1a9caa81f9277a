"""The only file that turns a batch into tensors and runs the model."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from moestro.cache import Phase
from moestro.engine.facts import TorchThreads
from moestro.engine.model import (
    HeldStates,
    KVStore,
    PackedCache,
    SequenceKV,
    StepPhase,
    run_packed,
)

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
    """Owns the KV of running sequences. `run` commits; `forget` frees."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PackedCache,
        step: StepPhase,
        kv_pages: int,
        head_rows: int,
        threads: TorchThreads,
    ) -> None:
        """`head_rows`: rows of logits that the memory plan has room for."""
        self._model = model
        self._cache = cache
        self._step = step
        self._head_rows = head_rows
        self._threads = threads
        self._store = KVStore(kv_pages)
        self._kv: dict[tuple[int, int], SequenceKV] = {}

    def run(self, batch: Batch) -> Ran:
        """On the host: a device is waited for here, before anything counts as computed.

        Either every sequence of the batch is advanced, or (on an exception) none.
        """
        lists, starts, keep, end = [], [], [], 0
        for part in batch.parts:
            sequence = part.sequence
            first = sequence.computed_tokens
            lists.append(sequence.token_ids[first : first + part.tokens])
            starts.append(first)
            end += part.tokens
            if part.ends_pending:
                keep.append(end - 1)
        parts = [(self._kv_of(part.sequence), part.tokens) for part in batch.parts]
        self._threads.settle(end)
        self._step.phase = Phase.PREFILL if batch.is_prefill else Phase.DECODE
        scoring = any(part.scored_tokens for part in batch.parts)
        self._cache.begin(parts)
        done = False
        try:
            with torch.inference_mode(), HeldStates(self._model) if scoring else nullcontext() as h:
                logits = run_packed(self._model, self._cache, lists, starts, keep or [end - 1])
                logits = logits.cpu()
                scores = {} if h is None else self._score(batch, h)
            done = True
        finally:
            self._cache.end(commit=done)
        for part in batch.parts:
            part.sequence.computed_tokens += part.tokens
        return Ran(logits if keep else logits[:0], scores)

    def fork(self, sequence: Sequence, twins: Iterable[Sequence]) -> None:
        """Each of `twins` goes on from where `sequence` is, on pages of its own."""
        kv = self._kv_of(sequence)
        with torch.inference_mode():
            for twin in twins:
                self._kv[twin.key] = kv.fork(twin.pages)

    def forget(self, sequence: Sequence) -> None:
        self._kv.pop(sequence.key, None)

    @property
    def held_sequences(self) -> int:
        return len(self._kv)

    def _kv_of(self, sequence: Sequence) -> SequenceKV:
        if sequence.key not in self._kv:
            self._kv[sequence.key] = SequenceKV(self._store, sequence.pages)
        return self._kv[sequence.key]

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
