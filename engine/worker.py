"""The one thread that loads the model and calls `step`; the door between it and an event loop.

Requests go in through a queue, events come out through `call_soon_threadsafe`. Nothing else is
shared: statistics are taken between two steps, by the engine thread itself; the last ones taken
can be had at any time.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Ids
from concurrent.futures import Future
from pathlib import Path

from moestro.cache import CacheError
from moestro.engine.facts import (
    Draining,
    EngineConfig,
    EngineError,
    EngineFailed,
    EngineLost,
    EngineState,
    EngineStats,
    LoadCancelled,
    ModelInfo,
    NotReady,
    Progress,
    ProgressFn,
    StartError,
    Unavailable,
)
from moestro.engine.step import Emitted, FinishReason, SamplingParams, Sequence, TokenEvent
from moestro.engine.text import Tokenizer

from .loader import Loaded, load

log = logging.getLogger("moestro.engine")

IDLE_BEAT_S = 0.5  # an idle engine turns this often, so that its heartbeat stays fresh
SHUTDOWN = "the server is shutting down"


class TokenStream:
    """The events of one request, on the event loop that submitted it.

    It ends when all its `answers` have, or with the first error.
    """

    def __init__(self, prompt_tokens: int, answers: int, cancel: Callable[[], None]) -> None:
        self.prompt_tokens = prompt_tokens
        self._answers_left = answers  # to be read
        self._answers_to_end = answers  # in the engine
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent | EngineError] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        """Raises EngineFailed when the engine died under the request."""
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, EngineError):
            self._ended = True
            raise event
        self._answers_left -= event.finish_reason is not None
        self._ended = self._answers_left == 0 or event.finish_reason is FinishReason.ERROR
        return event

    def cancel(self) -> None:
        """Idempotent; the sequence is dropped before the next step."""
        if not self._ended:
            self._ended = True
            self._cancel()

    def is_last(self, event: TokenEvent) -> bool:
        """Called from the engine thread, once for each event."""
        self._answers_to_end -= event.finish_reason is not None
        return self._answers_to_end == 0 or event.finish_reason is FinishReason.ERROR

    def deliver(self, event: TokenEvent | EngineError) -> None:
        """Called from the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits any more
            log.debug("an event had nobody to go to")


class EngineWorker:
    """Loads in its own thread, then serves until `stop`. All methods are thread safe."""

    def __init__(
        self,
        config: EngineConfig,
        progress: ProgressFn,
        prepare: Callable[[ProgressFn], Path] | None = None,
    ) -> None:
        self.config = config
        self.state = EngineState.LOADING
        self.failure: EngineError | None = None
        self.progress_now: Progress | None = None
        self._progress = progress
        self._prepare = prepare
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._snapshot: EngineStats | None = None
        self._gate = threading.Lock()  # guards the three below
        self._asked: Future[EngineStats] | None = None  # not answered yet
        self._streams: dict[int, TokenStream] = {}  # of requests submitted and not ended
        self._closed = False  # nothing more may be submitted: nobody would ever answer
        self._loaded: Loaded | None = None
        self._settled = threading.Event()  # READY or FAILED
        self._stopping = threading.Event()
        self._beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._live, name="moestro-engine", daemon=True)

    # Any thread ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        return self._settled.wait(timeout_s)

    @property
    def model(self) -> ModelInfo:
        return self._ready().info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._ready().tokenizer

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the loop last turned; a load has its own progress and counts as 0."""
        return 0.0 if self.state is EngineState.LOADING else time.monotonic() - self._beat_s

    @property
    def idle(self) -> bool:
        """No request is open."""
        return not self._streams

    def submit(self, prompt_ids: Ids[int], params: SamplingParams) -> TokenStream:
        """Call on the event loop that will read the stream.

        Raises RequestError for this request's own faults, Unavailable for the engine's.
        """
        engine = self._ready().engine
        if self.state is EngineState.DRAINING:
            raise Draining(SHUTDOWN)
        engine.validate(list(prompt_ids), params)
        sequence = Sequence(next(self._numbers), prompt_ids, params)
        engine.scheduler.refuse_when_full(self._inbox.qsize())
        stream = TokenStream(
            sequence.prompt_tokens, params.n, lambda: self._inbox.put(lambda: self._drop(sequence))
        )
        with self._gate:
            if self._closed:
                raise Draining(SHUTDOWN)
            self._streams[sequence.number] = stream
        self._inbox.put(lambda: self._take(sequence))
        return stream

    def most_new_tokens(self, prompt_tokens: int, n: int = 1, density: float | None = None) -> int:
        """The largest max_tokens with which such a request is accepted."""
        return self._ready().engine.most_new_tokens(prompt_tokens, n, density)

    def ask_stats(self) -> "Future[EngineStats]":
        """A snapshot after the step in progress: the same one for all who ask meanwhile."""
        self._ready()
        with self._gate:
            if self._asked is None:
                self._asked = Future()
                self._asked.set_running_or_notify_cancel()  # nobody may cancel it for the others
                self._inbox.put(self._take_snapshot)
            return self._asked

    @property
    def last_stats(self) -> EngineStats:
        """The last snapshot that was taken. Waits for nothing."""
        self._ready()
        assert self._snapshot is not None
        return self._snapshot

    def drain(self) -> None:
        """New requests are refused from now on; what runs goes on."""
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING

    def stop(self, timeout_s: float = 10.0) -> None:
        """End everything and join the thread; cancels a load in progress."""
        self._stopping.set()
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # The engine thread -----------------------------------------------------------------------

    def _live(self) -> None:
        try:
            self._loaded = load(self.config, self._report, self._prepare)
            self._snapshot = self._loaded.stats()
            self.state = EngineState.READY
            self._settled.set()
            self._serve(self._loaded)
        except (StartError, EngineLost) as error:
            self._fail(error)
        except CacheError as error:
            self._fail(self._failure_behind(error))
        except Exception as error:  # the thread's boundary: nobody may wait for ever
            log.exception("the engine's thread died")
            self._fail(self._failure_behind(error))
        finally:
            if self._loaded is not None:
                self._loaded.close()

    def _failure_behind(self, error: Exception) -> EngineError:
        if self._loaded is None and isinstance(error, CacheError):
            return StartError(str(error))
        unexpected = f"unexpected {type(error).__name__}: {error}"
        if self._loaded is None:
            return StartError(unexpected)
        return self._loaded.engine.loss_behind(error) or EngineFailed(unexpected)

    def _serve(self, loaded: Loaded) -> None:
        while not self._stopping.is_set():
            self._turn(loaded)
        self._deliver(loaded.engine.abort_all(SHUTDOWN))
        self._end_all(Draining(SHUTDOWN))
        self.state = EngineState.STOPPED

    def _turn(self, loaded: Loaded) -> None:
        """Requests in, one step, events out. Raises EngineLost."""
        self._beat_s = time.monotonic()
        try:
            command = self._inbox.get(block=loaded.engine.idle, timeout=IDLE_BEAT_S)
            while True:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            pass
        if not self._stopping.is_set():
            self._deliver(loaded.engine.step())
            if loaded.engine.lost is not None:
                raise loaded.engine.lost

    def _take_snapshot(self) -> None:
        assert self._loaded is not None
        with self._gate:
            asked, self._asked = self._asked, None
        assert asked is not None
        self._snapshot = self._loaded.stats()
        asked.set_result(self._snapshot)

    def _take(self, sequence: Sequence) -> None:
        assert self._loaded is not None
        try:
            self._loaded.engine.add(sequence)
        except EngineError as error:
            self._end(sequence.number, error)

    def _drop(self, sequence: Sequence) -> None:
        assert self._loaded is not None
        self._loaded.engine.cancel(sequence)
        with self._gate:
            self._streams.pop(sequence.number, None)

    def _deliver(self, emitted: Emitted) -> None:
        for sequence, event in emitted:
            stream = self._streams.get(sequence.number)
            if stream is not None and not stream.is_last(event):
                stream.deliver(event)
            else:
                self._end(sequence.number, event)

    def _end(self, number: int, last: TokenEvent | EngineError) -> None:
        with self._gate:
            stream = self._streams.pop(number, None)
        if stream is not None:
            stream.deliver(last)

    def _end_all(self, error: EngineError) -> None:
        """Nobody submitted may wait for ever, and nobody can be submitted any more."""
        with self._gate:
            self._closed = True
            streams = list(self._streams.values())
            self._streams.clear()
        for stream in streams:
            stream.deliver(error)

    def _report(self, progress: Progress) -> None:
        """Progress out; a stop in. Raises LoadCancelled."""
        self._beat_s = time.monotonic()
        if self._stopping.is_set():
            raise LoadCancelled("the start was stopped")
        self.progress_now = progress
        self._progress(progress)

    def _fail(self, failure: EngineError) -> None:
        self.failure = failure
        self.state = EngineState.FAILED
        self._end_all(_as_unavailable(failure))
        self._settled.set()

    def _ready(self) -> Loaded:
        """Raises NotReady while loading, EngineFailed after a failure."""
        if self.state is EngineState.FAILED:
            assert self.failure is not None
            raise _as_unavailable(self.failure)
        if self._loaded is None or not self._settled.is_set():
            raise NotReady("the model is still loading")
        return self._loaded


def _as_unavailable(failure: EngineError) -> Unavailable:
    """What a request is told of it; a new one each time, for it is raised."""
    kind = type(failure) if isinstance(failure, EngineLost) else EngineFailed
    return kind(str(failure))
