"""The engine without its thread: one `step` runs one batch. Knows no queue and no event loop."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moestro.cache import CacheError, PackInvalid, ReadFailed
from moestro.engine.facts import BadParameter, PackLost, PromptTooLong
from moestro.engine.text import TextStream, Tokenizer

from .runner import Runner
from .sampler import NonFiniteLogits, Sampler
from .scheduler import Scheduler
from .sequence import Batch, FinishReason, SamplingParams, Sequence, TokenEvent

log = logging.getLogger("moestro.engine")

STEP_FAILED = "this step of the engine failed; the server's log says why"
MOST_UNREAD_STEPS = 3  # without a request that ended well: no passing fault

Emitted = list[tuple[Sequence, TokenEvent]]


@dataclass(slots=True)
class Counters:
    """What has happened since the start."""

    finished: dict[str, int]
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    corrupted: int = 0


@dataclass(frozen=True, slots=True)
class _Output:
    """What turns one sequence's logits into text."""

    sampler: Sampler
    text: TextStream


class Engine:
    """Sequences in, token events out. Single-threaded."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        max_model_len_tokens: int,
        vocab_size: int,
        discard_pack: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_model_len_tokens = max_model_len_tokens
        self.vocab_size = vocab_size
        self.counters = Counters({reason.value: 0 for reason in FinishReason})
        self._clock = clock
        self.pack_lost: PackLost | None = None  # then no step can succeed any more
        self._unread_steps = 0  # that failed to read an expert since a request ended well
        self._discard_pack = discard_pack  # a damaged one; what became of it, in words
        self._outputs: dict[int, _Output] = {}

    def validate(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raises BadParameter or PromptTooLong; touches nothing, so any thread may call it."""
        if not prompt_ids:
            raise BadParameter("the prompt is empty", "prompt")
        if not all(0 <= token < self.vocab_size for token in prompt_ids):
            raise BadParameter(
                f"the prompt has token ids outside 0..{self.vocab_size - 1}", "prompt"
            )
        total = len(prompt_ids) + params.max_tokens
        if total > self.max_model_len_tokens:
            raise PromptTooLong.for_context(
                self.max_model_len_tokens,
                f"you requested {total} tokens ({len(prompt_ids)} in the prompt,"
                f" {params.max_tokens} for the completion)",
                reduce="either",
            )

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull, and then changes nothing."""
        self.scheduler.add(sequence)
        sequence.times.submitted_s = self._clock()
        text = self.tokenizer.stream(sequence.token_ids, sequence.params.stop)
        self._outputs[sequence.number] = _Output(Sampler(sequence.params), text)

    def step(self) -> Emitted:
        """schedule -> run -> sample -> commit."""
        batch = self.scheduler.next_batch()
        if not batch.parts:
            return []
        self._note_admission(batch)
        try:
            logits = self.runner.run(batch)
        except (CacheError, RuntimeError, MemoryError) as error:
            log.error("a step failed, its %d requests end: %s", len(batch.parts), error)
            self._judge_pack(error)
            return [self._fail(part.sequence, STEP_FAILED) for part in batch.parts]
        self._count(batch)
        ready = [part.sequence for part in batch.parts if part.sequence.pending_tokens == 0]
        return [self._commit(seq, row) for seq, row in zip(ready, logits, strict=True)]

    def cancel(self, sequence: Sequence) -> TokenEvent | None:
        """The client went away; None if the sequence had already ended."""
        if sequence.number not in self._outputs:
            return None
        return self._end(sequence, FinishReason.ABORT, "", ())[1]

    def abort_all(self, message: str) -> Emitted:
        """End everything that runs or waits with an error."""
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        return [self._fail(sequence, message) for sequence in everyone]

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    def check(self) -> None:
        """Views of the truth agree; called when idle and by tests."""
        self.scheduler.check()
        known = {s.number for s in [*self.scheduler.running, *self.scheduler.waiting]}
        assert known == set(self._outputs), f"{known} scheduled, {set(self._outputs)} have outputs"
        assert self.runner.held_sequences <= len(self.scheduler.running)

    def _judge_pack(self, error: Exception) -> None:
        """One failed read may pass. Damage does not, nor do reads that fail again and again."""
        if isinstance(error, PackInvalid):
            self.pack_lost = PackLost(f"{error}; {self._discard_pack()}")
        elif isinstance(error, ReadFailed):
            self._unread_steps += 1
            if self._unread_steps >= MOST_UNREAD_STEPS:
                self.pack_lost = PackLost(
                    f"{error}; {self._unread_steps} steps failed so and no request ended well: look"
                    " at the disk, and remove the pack if it is damaged; a start builds it anew"
                )

    def _note_admission(self, batch: Batch) -> None:
        now = self._clock()
        for part in batch.parts:
            if part.sequence.computed_tokens == 0:
                part.sequence.times.admitted_s = part.sequence.times.admitted_s or now

    def _count(self, batch: Batch) -> None:
        for part in batch.parts:
            start = part.sequence.computed_tokens - part.tokens
            self.counters.prompt_tokens += max(
                0, min(part.sequence.prompt_tokens, part.sequence.computed_tokens) - start
            )
        if batch.is_prefill:
            self.counters.prefill_steps += 1
        else:
            self.counters.decode_steps += 1

    def _commit(self, sequence: Sequence, logits: torch.Tensor) -> tuple[Sequence, TokenEvent]:
        output = self._outputs[sequence.number]
        try:
            token = output.sampler.choose(logits)
            text = "" if self._stops(sequence, token) else output.text.push(token).text
        except NonFiniteLogits as error:
            self.counters.corrupted += 1
            return self._fail(sequence, str(error))
        except Exception:
            log.exception("the choice of a token failed, its request ends")
            return self._fail(sequence, STEP_FAILED)
        sequence.token_ids.append(token)
        sequence.times.first_token_s = sequence.times.first_token_s or self._clock()
        self.counters.generation_tokens += 1
        if self._stops(sequence, token):
            return self._end(sequence, FinishReason.STOP, output.text.finish(), (token,))
        if output.text.stopped:
            return self._end(sequence, FinishReason.STOP, text, (token,))
        if sequence.generated_tokens >= sequence.params.max_tokens:
            text += output.text.finish()
            return self._end(sequence, FinishReason.LENGTH, text, (token,))
        return sequence, TokenEvent(text, (token,))

    def _stops(self, sequence: Sequence, token: int) -> bool:
        return token in self.tokenizer.stop_ids and not sequence.params.ignore_eos

    def _fail(self, sequence: Sequence, message: str) -> tuple[Sequence, TokenEvent]:
        return self._end(sequence, FinishReason.ERROR, "", (), message)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str,
        token_ids: tuple[int, ...],
        error: str | None = None,
    ) -> tuple[Sequence, TokenEvent]:
        sequence.times.finished_s = self._clock()
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._unread_steps = 0
        self.scheduler.remove(sequence)
        self.runner.forget(sequence)
        del self._outputs[sequence.number]
        self.counters.finished[reason.value] += 1
        timings = sequence.times.timings()
        return sequence, TokenEvent(text, token_ids, reason, timings, error)
