"""Token events to HTTP: watched for the client's leaving, sent as server-sent events or whole.

Whatever happens, the engine's streams are cancelled in `finally`; for finished ones that is
nothing.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moestro.engine import Draining, EngineError, EngineState, FinishReason, TokenEvent
from moestro.server.contract import GenerationFailed, Worker, problem_of
from moestro.server.metrics import Track

from .joined import Joined, drop

KEEP_ALIVE = b": keep-alive\n"  # no blank line: that would end an event, an empty one
DONE = b"data: [DONE]\n\n"
GENERIC = "the request failed in the engine"

_A_PATH = re.compile(r"(?<![\w/])~?/\w")
# Line ends to some readers of event streams, and to none of JSON.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\u0085\u2028\u2029"}

log = logging.getLogger("moestro.server")


class ClientGone(Exception):
    """The client hung up; nobody reads an answer."""


class Reply(Protocol):
    """One API's way to say what the events say."""

    def take(self, prompt: int, event: TokenEvent) -> list[dict[str, Any]]:
        """Adds the event; the choices of its chunks, none where there is nothing to say yet."""

    def add(self, prompt: int, event: TokenEvent) -> object:
        """As `take`, for who wants no chunks."""

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream, without usage."""

    def whole(self) -> dict[str, Any]:
        """The whole answer, without usage."""


async def watched(
    stream: Joined, receive: Receive, quiet_s: float | None = None
) -> AsyncGenerator[tuple[int, TokenEvent] | None]:
    """The stream's events up to the last; None after each `quiet_s` without one.

    ClientGone at once when the client leaves, EngineFailed when the engine does.
    """
    gone = asyncio.ensure_future(_disconnected(receive))
    coming: asyncio.Future[tuple[int, TokenEvent]] | None = None
    try:
        while not stream.over:
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
    finally:
        if coming is not None:
            drop(coming)
        stream.cancel()
        drop(gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def failure_of(event: TokenEvent, worker: Worker) -> Exception:
    """What an event with FinishReason.ERROR means for its request."""
    message = event.error or GENERIC
    if _A_PATH.search(message):  # of this machine, and nobody else's business
        log.error("a request failed: %s", message)
        message = f"{GENERIC}; its log says why"
    if worker.state is EngineState.READY:
        return GenerationFailed(message)
    return Draining(message)


def usage_of(track: Track) -> dict[str, int]:
    return {
        "prompt_tokens": track.prompt_tokens,
        "completion_tokens": track.generated_tokens,
        "total_tokens": track.prompt_tokens + track.generated_tokens,
    }


async def whole(
    reply: Reply, stream: Joined, receive: Receive, track: Track, worker: Worker
) -> bytes:
    """Waits for the last event; JSON. ClientGone, GenerationFailed or Unavailable."""
    try:
        async with aclosing(watched(stream, receive)) as events:
            async for told in events:
                if told is None:
                    continue
                prompt, event = told
                track.saw(event, prompt)
                if event.finish_reason is FinishReason.ERROR:
                    raise failure_of(event, worker)
                if event.finish_reason is FinishReason.ABORT:
                    raise ClientGone
                reply.add(prompt, event)
    except EngineError:
        track.failed()
        raise
    finally:
        stream.cancel()
        track.close()
    usage = usage_of(track)
    # In a thread: log probabilities of a long prompt are a million words.
    return await run_in_threadpool(lambda: json_text({**reply.whole(), "usage": usage}).encode())


@dataclass(slots=True)
class Sse:
    """Events of one answer as chunks; usage is asked for or not at all."""

    reply: Reply
    track: Track
    worker: Worker
    include_usage: bool = False  # in a chunk of its own behind the last
    usage_in_every_chunk: bool = False

    def chunks(self, told: tuple[int, TokenEvent] | None) -> list[bytes]:
        if told is None:
            return [KEEP_ALIVE]
        prompt, event = told
        self.track.saw(event, prompt)
        if event.finish_reason is FinishReason.ERROR:
            return [self.failed(failure_of(event, self.worker))]
        if event.finish_reason is FinishReason.ABORT:
            return []
        return [self._chunk([choice]) for choice in self.reply.take(prompt, event)]

    def last(self) -> list[bytes]:
        """Behind the last event of an answer that came to its end."""
        usage = [self._chunk([])] if self.include_usage else []
        return [*usage, DONE]

    def failed(self, error: Exception) -> bytes:
        return data(problem_of(error).body())

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        chunk = self.reply.chunk(choices)
        if self.usage_in_every_chunk or not choices:
            chunk["usage"] = usage_of(self.track)
        elif self.include_usage:
            chunk["usage"] = None
        return data(chunk)


def data(content: dict[str, Any]) -> bytes:
    """One event, in one line for every reader."""
    return f"data: {json_text(content).translate(_LINE_ENDS)}\n\n".encode()


def json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class EventStream(Response):
    """Sends itself. Starlette's own would learn of a lost client only at its next chunk."""

    media_type = "text/event-stream"

    def __init__(
        self, sse: Sse, stream: Joined, keep_alive_s: float, headers: Mapping[str, str]
    ) -> None:
        """`headers`: beside those of every stream."""
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers={**own, **headers})
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
        failed = False
        try:
            async with aclosing(watched(self._stream, receive, self._keep_alive_s)) as events:
                async for told in events:
                    for chunk in self._sse.chunks(told):
                        await _send_chunk(send, chunk)
                    failed = told is not None and told[1].finish_reason in _FAILURES
            if not failed:
                for chunk in self._sse.last():
                    await _send_chunk(send, chunk)
        except EngineError as error:
            self._sse.track.failed()
            await _send_chunk(send, self._sse.failed(error))


_FAILURES = (FinishReason.ERROR, FinishReason.ABORT)


async def _send_chunk(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
