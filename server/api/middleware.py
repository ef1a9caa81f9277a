"""What every request passes before a route sees it: its id, its key, the size of its body.

Plain ASGI, on the raw path: what a proxy or a Host header says is never trusted.
"""

import hmac
import re
import uuid
from collections.abc import Iterable
from hashlib import sha256

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moestro.server.contract import HTTP_ROWS, BodyTooLarge, Problem
from moestro.server.metrics import ServerMetrics

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """x-request-id on each response: the client's own if it is sane, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HeadAsGet:
    """HEAD wherever GET is: the server that writes the answer leaves its body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}

        async def send_allowing_head(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 405:
                headers = MutableHeaders(scope=message)
                if headers.get("allow") == "GET":
                    headers["allow"] = "GET, HEAD"
            await send(message)

        await self._app(scope, receive, send_allowing_head)


class ApiKey:
    """Everything but OPEN_PATHS needs `Authorization: Bearer KEY`, unknown paths included.

    The scheme's case does not count, as HTTP has it; the key's does. How long a comparison takes
    tells neither how much of a key is right nor which of them is near.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], metrics: ServerMetrics) -> None:
        self._app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._allows(scope):
            return await self._app(scope, receive, send)
        row = HTTP_ROWS[401]
        self._metrics.refused(scope["path"], row)
        problem = Problem(row, "missing or wrong API key", headers={"WWW-Authenticate": "Bearer"})
        await problem.response()(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        given = Headers(scope=scope).getlist("authorization")
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(" ")
        digest = sha256(key.encode("latin-1")).digest()
        right = [hmac.compare_digest(digest, known) for known in self._digests]  # with every one
        return scheme.lower() == "bearer" and any(right)


class BodyLimit:
    """BodyTooLarge out of `receive`: at once by Content-Length, else when the limit is passed."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        # 18 digits are enough to be too many, and too few to be slow to read.
        read_bytes = int(declared[:18]) if declared.isdecimal() else 0
        if read_bytes <= self._limit_bytes:
            read_bytes = 0  # the declared length is only believed when it is bad news

        async def limited() -> Message:
            nonlocal read_bytes
            if read_bytes > self._limit_bytes:
                raise BodyTooLarge(self._limit_bytes)
            message = await receive()
            read_bytes += len(message.get("body", b""))
            if read_bytes > self._limit_bytes:
                raise BodyTooLarge(self._limit_bytes)
            return message

        await self._app(scope, limited, send)
