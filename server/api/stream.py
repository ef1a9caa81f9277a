"""Token events to HTTP: watched for the client's leaving, sent as server-sent events or whole.

Whatever happens, the engine's stream is cancelled in `finally`; for a finished one that is
nothing.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moestro.engine import Draining, EngineError, EngineState, FinishReason, TokenEvent
from moestro.server.contract import GenerationFailed, Stream, Worker, problem_of
from moestro.server.metrics import Track

from .schemas import Completion, CompletionChoice, Usage

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
GENERIC = "the request failed in the engine"

_A_PATH = re.compile(r"(?<![\w/])~?/\w")

log = logging.getLogger("moestro.server")


class ClientGone(Exception):
    """The client hung up; nobody reads an answer."""


async def watched(
    stream: Stream, receive: Receive, quiet_s: float | None = None
) -> AsyncGenerator[TokenEvent | None]:
    """The stream's events up to the last; None after each `quiet_s` without one.

    ClientGone at once when the client leaves, EngineFailed when the engine does.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    coming: asyncio.Future[TokenEvent] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(stream.__anext__())
            both: set[asyncio.Future[Any]] = {gone, coming}
            await asyncio.wait(both, timeout=quiet_s, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientGone
            if not coming.done():
                yield None
                continue
            event, coming = coming.result(), None
            yield event
            if event.finish_reason is not None:
                return
    finally:
        stream.cancel()
        _drop(gone)
        if coming is not None:
            _drop(coming)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _drop(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    # Asked for its error, so that asyncio does not complain that nobody did.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


def failure_of(event: TokenEvent, worker: Worker) -> Exception:
    """What an event with FinishReason.ERROR means for its request."""
    message = event.error or GENERIC
    if _A_PATH.search(message):  # of this machine, and nobody else's business
        log.error("a request failed: %s", message)
        message = f"{GENERIC}; its log says why"
    if worker.state is EngineState.READY:
        return GenerationFailed(message)
    return Draining(message)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is the same in every piece of one answer."""

    id: str
    created: int
    model: str

    def piece(self, text: str, reason: FinishReason | None) -> Completion:
        known = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
        choice = CompletionChoice.model_validate(
            {"text": text, "finish_reason": known[reason] if reason else None}
        )
        return Completion(id=self.id, created=self.created, model=self.model, choices=[choice])


async def whole(
    answer: Answer, stream: Stream, receive: Receive, track: Track, worker: Worker
) -> Completion:
    """Waits for the last event. ClientGone, GenerationFailed or Unavailable."""
    texts: list[str] = []
    try:
        async with aclosing(watched(stream, receive)) as events:
            async for event in events:
                if event is None:
                    continue
                track.saw(event)
                texts.append(event.text)
                if event.finish_reason is FinishReason.ERROR:
                    raise failure_of(event, worker)
                if event.finish_reason is FinishReason.ABORT:
                    raise ClientGone
                reason = event.finish_reason
    except EngineError:
        track.failed()
        raise
    finally:
        stream.cancel()
        track.close()
    completion = answer.piece("".join(texts), reason)
    completion.usage = Usage.of(track.prompt_tokens, track.generated_tokens)
    return completion


@dataclass(slots=True)
class Sse:
    """Events of one answer as chunks; `usage` is asked for or not at all."""

    answer: Answer
    track: Track
    worker: Worker
    include_usage: bool

    def chunks(self, event: TokenEvent | None) -> list[bytes]:
        if event is None:
            return [KEEP_ALIVE]
        self.track.saw(event)
        if event.finish_reason is FinishReason.ERROR:
            return [self.failed(failure_of(event, self.worker))]
        if event.finish_reason is FinishReason.ABORT:
            return []
        chunks = []
        if event.text or event.finish_reason is not None:
            chunks.append(self._data(self.answer.piece(event.text, event.finish_reason)))
        if event.finish_reason is not None:
            chunks += [*self._usage(), DONE]
        return chunks

    def failed(self, error: Exception) -> bytes:
        return f"data: {json.dumps(problem_of(error).body())}\n\n".encode()

    def _usage(self) -> list[bytes]:
        if not self.include_usage:
            return []
        answer = self.answer
        last = Completion(id=answer.id, created=answer.created, model=answer.model, choices=[])
        last.usage = Usage.of(self.track.prompt_tokens, self.track.generated_tokens)
        return [self._data(last)]

    def _data(self, chunk: Completion) -> bytes:
        exclude = None if self.include_usage else {"usage"}
        return f"data: {chunk.model_dump_json(exclude=exclude)}\n\n".encode()


class EventStream(Response):
    """Sends itself. Starlette's own would learn of a lost client only at its next chunk."""

    media_type = "text/event-stream"

    def __init__(self, sse: Sse, stream: Stream, keep_alive_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._sse = sse
        self._stream = stream
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["event_stream"] = True  # comments may be sent in between
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._send_events(receive, send)
            await send({"type": "http.response.body", "body": b""})
        except (ClientGone, OSError):  # OSError: how other servers than uvicorn say the same
            return
        finally:
            self._stream.cancel()
            self._sse.track.close()

    async def _send_events(self, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(watched(self._stream, receive, self._keep_alive_s)) as events:
                async for event in events:
                    for chunk in self._sse.chunks(event):
                        await _send_chunk(send, chunk)
        except EngineError as error:
            self._sse.track.failed()
            await _send_chunk(send, self._sse.failed(error))


async def _send_chunk(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
