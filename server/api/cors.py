"""Which web pages' scripts may read what is answered here: those of the allowed origins.

Starlette's, in two ways stricter: an origin that is not allowed hears nothing of what others may,
and what is refused has the shape of all errors.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moestro.server.contract import INVALID, Problem, Row

METHODS = ("GET", "HEAD", "POST")
REFUSED = Row(400, INVALID, "cors_refused")


class Cors(CORSMiddleware):
    """Answers preflights itself: they carry no key. No credentials: a key is no cookie."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # clients of OpenAI's API send many of their own
            expose_headers=("x-request-id", "retry-after", "x-moestro-experts"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and self._is_foreign(scope):
            return await self.app(scope, receive, send)
        await super().__call__(scope, receive, send)

    def _is_foreign(self, scope: Scope) -> bool:
        origin = Headers(scope=scope).get("origin")
        return origin is not None and not self.is_allowed_origin(origin)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        words = bytes(response.body).decode()
        return Problem(REFUSED, f"{words}: allowed are {', '.join(METHODS)}").response()
