"""The engine without its thread: one `step` runs one batch. Knows no queue and no event loop."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from moestro.cache import CacheError, DeviceFailed, PackInvalid, ReadFailed
from moestro.engine.facts import (
    NO_SEQUENCE_EXPERTS,
    BadParameter,
    DeviceLost,
    EngineLost,
    PackLost,
    PromptTooLong,
)
from moestro.engine.text import CompiledGrammar, GrammarFault, Piece, TextStream, Tokenizer

from .adjust import Adjustments
from .events import FinishReason, TokenEvent, TokenLogprob
from .logprobs import of_token
from .params import SamplingParams
from .runner import Ran, Runner
from .sampler import NonFiniteLogits, Sampler
from .scheduler import Scheduler
from .sequence import Batch, Sequence

log = logging.getLogger("moestro.engine")

STEP_FAILED = "this step of the engine failed; the server's log says why"
MOST_UNREAD_STEPS = 3  # without a request that ended well: no passing fault

SILENT = Piece("", "")

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
    grammar: CompiledGrammar | None  # of all answers of the request
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # so far, not told yet


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
        device_fault: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.max_model_len_tokens = max_model_len_tokens
        self.vocab_size = vocab_size
        self.counters = Counters({reason.value: 0 for reason in FinishReason})
        self._clock = clock
        self.lost: EngineLost | None = None  # then no step can succeed any more
        self._unread_steps = 0  # that failed to read an expert since a request ended well
        self._discard_pack = discard_pack  # a damaged one; what became of it, in words
        self._device_fault = device_fault  # as Device.fault
        self._outputs: dict[tuple[int, int], _Output] = {}  # by Sequence.key

    def validate(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raises BadParameter or PromptTooLong; touches nothing, so any thread may call it."""
        if not prompt_ids:
            raise BadParameter("the prompt is empty", "prompt")
        if not all(0 <= token < self.vocab_size for token in prompt_ids):
            raise BadParameter(
                f"the prompt has token ids outside 0..{self.vocab_size - 1}", "prompt"
            )
        self._validate_ids(params)
        if params.expert_density is not None and self.runner.selection is None:
            words = f"experts: {NO_SEQUENCE_EXPERTS}; leave it out, or ask for mode token"
            raise BadParameter(words, "experts")
        total = len(prompt_ids) + params.max_tokens
        if total > self.max_model_len_tokens:
            raise PromptTooLong.for_context(
                self.max_model_len_tokens,
                f"you requested {total} tokens ({len(prompt_ids)} in the prompt,"
                f" {params.max_tokens} for the completion)",
                reduce="either",
            )
        self.scheduler.refuse_what_never_fits(Sequence(0, prompt_ids, params))

    def most_new_tokens(self, prompt_tokens: int, n: int, density: float | None = None) -> int:
        """The largest max_tokens that `validate` accepts with such a prompt and `n` answers.

        `density` of experts that their prompt chooses; None: tokens choose.
        """
        left = self.max_model_len_tokens - prompt_tokens
        return max(0, min(left, self.scheduler.most_new_tokens(prompt_tokens, n, density)))

    def add(self, sequence: Sequence) -> None:
        """Raises QueueFull or GrammarRefused, and then changes nothing.

        A grammar that nobody has compiled yet (`tokenizer.grammars`) holds up the engine.
        """
        spec = sequence.params.grammar
        output = self._output(sequence, self.tokenizer.grammars.compile(spec) if spec else None)
        self.scheduler.add(sequence)
        sequence.times.submitted_s = self._clock()
        self._outputs[sequence.key] = output

    def step(self) -> Emitted:
        """schedule -> run -> sample -> commit."""
        batch = self.scheduler.next_batch()
        if not batch.parts:
            return []
        self._note_admission(batch)
        try:
            ran = self.runner.run(batch)
        except (CacheError, RuntimeError, MemoryError) as error:
            log.error("a step failed, its %d sequences end: %s", len(batch.parts), error)
            self.lost = self.loss_behind(error)
            return self._fail_all([part.sequence for part in batch.parts], STEP_FAILED)
        self._count(batch)
        self._keep_scores(ran)
        ready = [part.sequence for part in batch.parts if part.sequence.pending_tokens == 0]
        return [
            event
            for sequence, row in zip(ready, ran.logits, strict=True)
            for event in self._answer(sequence, row)
        ]

    def cancel(self, sequence: Sequence) -> TokenEvent | None:
        """The client went away, so all answers end; None if they had already ended."""
        events = [self._end(one, FinishReason.ABORT)[1] for one in self._answers_of(sequence)]
        return events[0] if events else None

    def abort_all(self, message: str) -> Emitted:
        """End everything that runs or waits with an error."""
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        return self._fail_all(everyone, message)

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    def check(self) -> None:
        """Views of the truth agree; called when idle and by tests."""
        self.scheduler.check()
        known = {s.key for s in [*self.scheduler.running, *self.scheduler.waiting]}
        assert known == set(self._outputs), f"{known} scheduled, {set(self._outputs)} have outputs"
        assert self.runner.held_sequences <= len(self.scheduler.running)
        selection = self.runner.selection
        assert selection is None or selection.held_sequences <= len(self.scheduler.running)

    def _validate_ids(self, params: SamplingParams) -> None:
        """What only the model and the limits can tell about the parameters."""
        ids = {
            "logit_bias": [token for token, _ in params.logit_bias],
            "stop_token_ids": list(params.stop_token_ids),
        }
        for name, tokens in ids.items():
            if not all(0 <= token < self.vocab_size for token in tokens):
                raise BadParameter(f"{name} has token ids outside 0..{self.vocab_size - 1}", name)
        most = self.scheduler.limits.max_running
        if params.n > most:
            raise BadParameter(
                f"n must be at most {most}, as many sequences as run at once here, not {params.n}",
                "n",
            )

    def loss_behind(self, error: Exception) -> EngineLost | None:
        """What ends the engine, where `error` shows it; None: the next step may succeed.

        One failed read may pass. Damage does not, nor do reads that fail again and again. Memory
        that ran out comes back. Behind any other error may stand a device that is lost: it is
        asked.
        """
        if isinstance(error, DeviceFailed):
            return DeviceLost(str(error))
        if isinstance(error, PackInvalid):
            return PackLost(f"{error}; {self._discard_pack()}")
        if isinstance(error, ReadFailed):
            self._unread_steps += 1
            if self._unread_steps < MOST_UNREAD_STEPS:
                return None
            return PackLost(
                f"{error}; {self._unread_steps} steps failed so and no request ended well: look"
                " at the disk, and remove the pack if it is damaged; a start builds it anew"
            )
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return None
        fault = self._device_fault()
        return None if fault is None else DeviceLost(fault)

    def _note_admission(self, batch: Batch) -> None:
        now = self._clock()
        for part in batch.parts:
            if part.sequence.computed_tokens == 0:
                part.sequence.times.admitted_s = part.sequence.times.admitted_s or now

    def _keep_scores(self, ran: Ran) -> None:
        for key, scores in ran.prompt_logprobs.items():
            self._outputs[key].prompt_logprobs.extend(scores)

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

    def _answer(self, sequence: Sequence, logits: torch.Tensor) -> Emitted:
        """The next token of `sequence`, or the first ones of all answers to its prompt."""
        if sequence.params.max_tokens == 0:
            return [self._end(sequence, FinishReason.LENGTH)]
        everyone = [sequence]
        if sequence.pages_of_forks:
            everyone += self.scheduler.fork(sequence)
            self.runner.fork(sequence, everyone[1:])
            grammar = self._outputs[sequence.key].grammar
            self._outputs |= {one.key: self._output(one, grammar) for one in everyone[1:]}
        events: Emitted = []
        for one in everyone:
            if one.key in self._outputs:  # else another answer failed and took all with it
                events.append(self._commit(one, logits))
        return events

    def _commit(self, sequence: Sequence, logits: torch.Tensor) -> tuple[Sequence, TokenEvent]:
        output = self._outputs[sequence.key]
        try:
            token = output.sampler.choose(logits)
            piece = SILENT if self._is_silent(sequence, token) else output.text.push(token)
            count = sequence.params.logprobs
            scores = () if count is None else (of_token(logits.numpy(), token, count),)
        except (NonFiniteLogits, GrammarFault) as error:
            self.counters.corrupted += isinstance(error, NonFiniteLogits)
            return self._fail(sequence, str(error))
        except Exception:
            log.exception("the choice of a token failed, its request ends")
            return self._fail(sequence, STEP_FAILED)
        sequence.token_ids.append(token)
        sequence.times.first_token_s = sequence.times.first_token_s or self._clock()
        self.counters.generation_tokens += 1
        step = TokenEvent(
            piece.text,
            (token,),
            index=sequence.index,
            token_texts=(piece.token_text,),
            logprobs=scores,
        )
        reason = self._reason(sequence, output, token)
        if reason is not None:
            return self._end(
                sequence, reason, replace(step, text=piece.text + output.text.finish())
            )
        return sequence, self._told(sequence, step)

    def _reason(self, sequence: Sequence, output: _Output, token: int) -> FinishReason | None:
        if output.text.stopped or output.sampler.finished or self._stops(sequence, token):
            return FinishReason.STOP
        if sequence.generated_tokens >= sequence.params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _told(self, sequence: Sequence, event: TokenEvent) -> TokenEvent:
        """With what is known of the prompt by now and was not told yet."""
        scores = self._outputs[sequence.key].prompt_logprobs
        event = replace(event, prompt_logprobs=tuple(scores)) if scores else event
        scores.clear()
        return event

    def _output(self, sequence: Sequence, grammar: CompiledGrammar | None) -> _Output:
        params = sequence.params
        text = self.tokenizer.stream(
            sequence.token_ids,
            params.stop,
            include_stop=params.include_stop,
            skip_special_tokens=params.skip_special_tokens,
        )
        return _Output(self._sampler(sequence, grammar), text, grammar)

    def _sampler(self, sequence: Sequence, grammar: CompiledGrammar | None) -> Sampler:
        params = sequence.params
        constraint = grammar.constraint() if grammar is not None else None
        changes = Adjustments(params, sequence.token_ids, self._end_ids(params), constraint)
        return Sampler(params, changes, index=sequence.index)

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        """Where a grammar lets them come, they are the end of what it describes."""
        ignored = params.ignore_eos and params.grammar is None
        return frozenset() if ignored else self.tokenizer.stop_ids

    def _stops(self, sequence: Sequence, token: int) -> bool:
        params = sequence.params
        return token in self._end_ids(params) or token in params.stop_token_ids

    def _is_silent(self, sequence: Sequence, token: int) -> bool:
        return self._stops(sequence, token) and not sequence.params.include_stop

    def _answers_of(self, sequence: Sequence) -> list[Sequence]:
        """All of its request that run or wait, itself too."""
        known = [*self.scheduler.running, *self.scheduler.waiting]
        return [one for one in known if one.number == sequence.number]

    def _fail(self, sequence: Sequence, message: str) -> tuple[Sequence, TokenEvent]:
        """Ends all answers of its request: they are of no use without each other."""
        for one in self._answers_of(sequence):
            if one is not sequence:
                self._end(one, FinishReason.ABORT)
        last = TokenEvent("", (), index=sequence.index, error=message)
        return self._end(sequence, FinishReason.ERROR, last)

    def _fail_all(self, sequences: list[Sequence], message: str) -> Emitted:
        return [
            self._fail(sequence, message) for sequence in sequences if sequence.key in self._outputs
        ]

    def _end(
        self, sequence: Sequence, reason: FinishReason, last: TokenEvent | None = None
    ) -> tuple[Sequence, TokenEvent]:
        """`last`: what its last step gave, if it had one."""
        sequence.times.finished_s = self._clock()
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._unread_steps = 0
        event = self._told(sequence, last or TokenEvent("", (), index=sequence.index))
        self.scheduler.remove(sequence)
        self.runner.forget(sequence)
        del self._outputs[sequence.key]
        self.counters.finished[reason.value] += 1
        return sequence, replace(event, finish_reason=reason, timings=sequence.times.timings())
