"""An engine without a model, with the interface of `moestro.engine.EngineWorker`.

What a request answers is a script: an async generator of token events. Honest where it matters:
states, refusals, cancellation and shutdown behave as the engine's do.
"""

import asyncio
import codecs
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from chat_formats import ChatFormat, render, template_text
from moestro.cache import CacheStats, LayerStats
from moestro.engine import (
    BadParameter,
    Draining,
    EngineError,
    EngineFailed,
    EngineState,
    EngineStats,
    FinishReason,
    GrammarSpec,
    ModelInfo,
    NotReady,
    PrefetchStats,
    Progress,
    PromptTooLong,
    RecallStats,
    SamplingParams,
    SelectionStats,
    TemplateFacts,
    TemplateRefused,
    Timings,
    TokenEvent,
    TokenizerInfo,
)

Script = Callable[[Sequence[int], SamplingParams], AsyncGenerator[TokenEvent, None]]

TIMINGS = Timings(queue_s=0.25, prefill_s=0.5, decode_s=1.0)
MODEL = ModelInfo(
    family="fake",
    max_model_len_tokens=64,
    vocab_size=256,
    num_layers=3,
    moe_layers=2,
    num_experts=8,
    experts_per_token=2,
    expert_bytes=1000,
    expert_format="native",
    lane="packed",
    created_s=1_700_000_000,
)
STATS = EngineStats(
    requests_running=1,
    requests_waiting=2,
    requests_finished={reason.value: 0 for reason in FinishReason},
    prompt_tokens=30,
    generation_tokens=40,
    prefill_steps=3,
    decode_steps=37,
    kv_used_bytes=25,
    kv_capacity_bytes=100,
    corrupted_requests=0,
    load_s={"pack": 1.5, "load": 2.5},
    planned_bytes={"interpreter": 100, "dense": 200, "experts": 300, "kv": 100},
    cache=CacheStats(
        layers=(
            LayerStats(
                "model.layers.1.mlp.experts", hits=5, prefetch_hits=3, misses=2, evictions=1
            ),
            LayerStats(
                "model.layers.2.mlp.experts", hits=7, prefetch_hits=0, misses=4, evictions=0
            ),
        ),
        demand_loads=6,
        prefetch_loads=4,
        demand_bytes=6000,
        prefetch_bytes=4000,
        prefetches_used=3,
        prefetches_late=1,
        prefetches_wasted=0,
        prefetches_dropped=2,
        prefetch_rereads=1,
        prefetch_head_start_s=0.03,
        prefetch_behind_s=0.02,
        demand_read_s=0.5,
        prefetch_read_s=0.25,
        prefill_stall_s=0.125,
        decode_stall_s=0.0625,
        slots=8,
        slots_used=7,
        slot_bytes=1000,
        capacity_bytes=8000,
        used_bytes=7000,
    ),
    prefetch=PrefetchStats(
        on=True,
        pauses=1,
        gain_s=0.75,
        cost_s=0.5,
        layers=(
            RecallStats(guessed=0, right=0, asked=0, chosen=0, chosen_right=0),
            RecallStats(guessed=10, right=8, asked=9, chosen=4, chosen_right=3),
        ),
    ),
    selection=SelectionStats(
        requests={"token": 5, "sequence": 2, "short_prompt": 1},
        kept_experts=16,
        known_experts=32,
        neuron_copies_bytes=4096,
    ),
)


async def three_words(ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent]:
    """' a', an event without text, ' force.' with the end."""
    yield TokenEvent(" a", (1,))
    yield TokenEvent("", (2,))
    yield TokenEvent(" force.", (3, 4), FinishReason.STOP, TIMINGS)


async def one_then_silence(
    ids: Sequence[int], params: SamplingParams
) -> AsyncGenerator[TokenEvent]:
    yield TokenEvent(" a", (1,))
    await asyncio.Event().wait()


def script_of(*events: TokenEvent | EngineError) -> Script:
    """A script that plays the events and raises the errors."""

    async def play(ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent]:
        for event in events:
            if isinstance(event, EngineError):
                raise event
            yield event

    return play


class FakeGrammars:
    """Remembers what was asked for; refuses with `refusal`, if there is one."""

    def __init__(self) -> None:
        self.compiled: list[GrammarSpec] = []
        self.refusal: EngineError | None = None

    def compile(self, spec: GrammarSpec) -> None:
        self.compiled.append(spec)
        if self.refusal is not None:
            raise self.refusal


class FakeTokenizer:
    """One token per UTF-8 byte; `info` is what a test says."""

    def __init__(self) -> None:
        self.info = TokenizerInfo("<s>", "</s>", None, None)
        self.grammars = FakeGrammars()
        self.chat: ChatFormat | None = None
        self.rendered: list[dict[str, Any]] = []  # what templates were given

    @property
    def special_texts(self) -> frozenset[str]:
        return self.chat.special_texts if self.chat else frozenset()

    @property
    def template_text(self) -> str:
        return template_text(self.chat.template) if self.chat else ""

    @property
    def template_facts(self) -> TemplateFacts:
        if self.chat is None:
            raise TemplateRefused("the model has no chat template", "messages")
        return TemplateFacts(takes_strings=True, takes_parts=False, renders_tools=True)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ) -> str:
        if self.chat is None:
            raise TemplateRefused("the model has no chat template", "messages")
        self.rendered.append({"messages": messages, "tools": tools, **kwargs})
        return render(
            self.chat.template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **kwargs,
        )

    def encode(
        self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
    ) -> list[int]:
        if most_tokens is not None and len(text) > most_tokens:
            raise PromptTooLong("the text is too long", "prompt")
        return list(text.encode())

    def encode_with_texts(
        self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[str]]:
        ids = self.encode(text, most_tokens)
        return ids, self.texts(ids)

    def texts(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(bytes([token])) for token in ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"


class FakeStream:
    """A script, raced against the end that `FakeWorker.stop` delivers."""

    def __init__(
        self, prompt_tokens: int, events: AsyncGenerator[TokenEvent], worker: "FakeWorker"
    ):
        self.prompt_tokens = prompt_tokens
        self.cancelled = asyncio.Event()
        self._events = events
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._cut: asyncio.Future[TokenEvent] = self._loop.create_future()

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> TokenEvent:
        step: asyncio.Future[TokenEvent] = asyncio.ensure_future(_next(self._events))
        goes_on = False
        try:
            await asyncio.wait({step, self._cut}, return_when=asyncio.FIRST_COMPLETED)
            event = step.result() if step.done() else self._cut.result()
            goes_on = event.finish_reason is None
        finally:
            step.cancel()
            if not goes_on:
                self._worker.open.discard(self)
        return event

    def cancel(self) -> None:
        self.cancelled.set()
        self._worker.open.discard(self)

    def cut(self) -> None:
        """Any thread: the last event of a request that the shutdown ends."""
        event = TokenEvent("", (), FinishReason.ERROR, error="the server is shutting down")
        self._loop.call_soon_threadsafe(self._cut.set_result, event)


async def _next(events: AsyncGenerator[TokenEvent]) -> TokenEvent:
    return await anext(events)


@dataclass(frozen=True, slots=True)
class Submitted:
    ids: tuple[int, ...]
    params: SamplingParams
    stream: FakeStream


class FakeWorker:
    """READY from the start, unless told otherwise; `refusal` is raised by every submit."""

    def __init__(
        self, script: Script = three_words, *, state: EngineState = EngineState.READY
    ) -> None:
        self.script = script
        self.state = state
        self.failure: EngineError | None = None
        self.progress_now: Progress | None = None
        self.refusal: EngineError | None = None
        self.heartbeat_age_s = 0.0
        self.submitted: list[Submitted] = []
        self.open: set[FakeStream] = set()
        self.tokens = FakeTokenizer()
        self.info = MODEL
        self.stats_now = STATS
        self.snapshot = STATS
        self.in_a_step = False  # a long one: who asks for statistics is not answered
        self.questions: list[Future[EngineStats]] = []
        self.stops = 0

    @property
    def model(self) -> ModelInfo:
        self._check_loaded()
        return self.info

    @property
    def tokenizer(self) -> FakeTokenizer:
        self._check_loaded()
        return self.tokens

    @property
    def idle(self) -> bool:
        return not self.open

    def start(self) -> None:
        """A test loads it by setting `state`."""

    def fail(self, failure: EngineError) -> None:
        self.failure = failure
        self.state = EngineState.FAILED

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> FakeStream:
        self._check_loaded()
        if self.state is EngineState.DRAINING:
            raise Draining("the server is shutting down")
        if self.refusal is not None:
            raise self.refusal
        if max(prompt_ids) >= self.info.vocab_size:
            raise BadParameter("the prompt has token ids outside 0..255", "prompt")
        if len(prompt_ids) + params.max_tokens > self.info.max_model_len_tokens:
            raise PromptTooLong("the KV budget is smaller")
        stream = FakeStream(len(prompt_ids), self.script(prompt_ids, params), self)
        self.open.add(stream)
        self.submitted.append(Submitted(tuple(prompt_ids), params, stream))
        return stream

    def most_new_tokens(self, prompt_tokens: int, n: int = 1, density: float | None = None) -> int:
        return max(0, self.info.max_model_len_tokens - prompt_tokens)

    @property
    def last_stats(self) -> EngineStats:
        self._check_loaded()
        return self.snapshot

    def ask_stats(self) -> "Future[EngineStats]":
        self._check_loaded()
        if self.in_a_step:
            asked: Future[EngineStats] = Future()
            self.questions.append(asked)
            return asked
        self.snapshot = replace(self.stats_now, requests_running=len(self.open))
        answered: Future[EngineStats] = Future()
        answered.set_result(self.snapshot)
        return answered

    def drain(self) -> None:
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING

    def stop(self, timeout_s: float = 10.0) -> None:
        self.stops += 1
        for stream in list(self.open):
            stream.cut()
        if self.state is not EngineState.FAILED:
            self.state = EngineState.STOPPED

    def _check_loaded(self) -> None:
        if self.state is EngineState.LOADING:
            raise NotReady("the model is still loading")
        if self.state is EngineState.FAILED:
            raise EngineFailed("the engine failed: secret detail in /some/path")


async def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    """Waits for what another task or process does; TimeoutError if it never happens."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.01)


async def within(seconds: float, what: Awaitable[object]) -> None:
    async with asyncio.timeout(seconds):
        await what
