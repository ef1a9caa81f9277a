"""The real engine, without a model: its logits make greedy choices say given tokens."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fake_engine import MODEL, FakeWorker
from moestro.engine import SamplingParams, TokenEvent, Tokenizer
from moestro.engine.facts import CPU
from moestro.engine.step.core import Engine
from moestro.engine.step.logprobs import of_rows
from moestro.engine.step.runner import Ran
from moestro.engine.step.scheduler import Scheduler, SchedulerLimits
from moestro.engine.step.sequence import Batch, Part
from moestro.engine.step.sequence import Sequence as Running

VOCAB = 290  # above every id of the tiny tokenizers: a few are holes
LIMITS = SchedulerLimits(
    max_running=8,
    max_waiting=8,
    max_step_tokens=8,  # longer prompts come in several steps
    kv_capacity_bytes=1 << 20,
    kv_bytes_per_token=1,
)


class ScriptedRunner:
    """`answers[i][k]` is token k of answer i; all answers begin with the first one's."""

    held_sequences = 0
    selection = None

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self._answers = answers
        self._random = torch.Generator().manual_seed(0)

    def run(self, batch: Batch) -> Ran:
        scores = {
            part.sequence.key: self._score(part) for part in batch.parts if part.scored_tokens
        }
        ends = [part.sequence for part in batch.parts if part.ends_pending]
        for part in batch.parts:
            part.sequence.computed_tokens += part.tokens
        rows = self._rows(len(ends))
        for row, sequence in zip(rows, ends, strict=True):
            row[self._answers[sequence.index][sequence.generated_tokens]] = 9.0
        return Ran(rows, scores)

    def fork(self, sequence: Running, twins: Iterable[Running]) -> None:
        """Nothing is kept."""

    def forget(self, sequence: Running) -> None:
        """Nothing is kept."""

    def _score(self, part: Part) -> Any:
        first = part.sequence.computed_tokens + 1
        ids = part.sequence.token_ids[first : first + part.scored_tokens]
        return of_rows(self._rows(len(ids)), ids, part.sequence.params.prompt_logprobs or 0)

    def _rows(self, count: int) -> torch.Tensor:
        return torch.rand(count, VOCAB, generator=self._random)


class ScriptedWorker(FakeWorker):
    """Answers every request with what `says` was given; asked for no more tokens than these."""

    def __init__(self) -> None:
        super().__init__(self._play)
        self.tokens: Any
        self.info = replace(MODEL, vocab_size=VOCAB, max_model_len_tokens=1000)

    def says(self, tokenizer: Tokenizer, answers: Sequence[Sequence[int]]) -> None:
        self.tokens, self._answers = tokenizer, answers

    async def _play(self, ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent]:
        runner: Any = ScriptedRunner(self._answers)
        engine = Engine(runner, Scheduler(LIMITS), self.tokens, 1000, VOCAB, lambda: "", CPU.fault)
        engine.add(Running(1, ids, params))
        while not engine.idle:
            for _, event in engine.step():
                yield event
            await asyncio.sleep(0)
