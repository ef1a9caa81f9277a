"""From an exception to an answer: one table for the engine's errors, one for HTTP's own.

UnknownModel          404, the request names a model that is not served
GenerationFailed      500, one request failed in the engine, the others go on
BodyTooLarge          413, raised by the body limit while the body is read
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from moestro.engine import (
    DeviceLost,
    Draining,
    EngineFailed,
    EngineLost,
    EngineState,
    NotReady,
    PackLost,
    PromptTooLong,
    QueueFull,
    RequestError,
    Unavailable,
)

UNSUPPORTED = "unsupported_parameter"  # the type of our refusals, and their `code`

log = logging.getLogger("moestro.server")

MAX_MESSAGE_CHARS = 1000
MAX_PATH_CHARS = 100
INVALID = "invalid_request_error"
DOWN = "service_unavailable"
BROKEN = "server_error"
LOST = (
    "the file of the experts cannot be read any more and the engine has ended; the log says why"
    " and what to do"
)
GONE = "the engine failed and will not come back; its log says why"


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The shape of every error."""

    error: ErrorObject


class UnknownModel(Exception):
    pass


class GenerationFailed(Exception):
    pass


class BodyTooLarge(HTTPException):
    """An HTTPException, because FastAPI lets only those out of its reading of the body."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(413, f"the request body is larger than {limit_bytes} bytes")


@dataclass(frozen=True, slots=True)
class Row:
    """How one error looks outside. `rejection` is its label in admission_rejections_total."""

    status: int
    type: str
    code: str
    retry_after_s: int | None = None
    rejection: str | None = None
    message: str | None = None  # instead of the error's own, which may tell too much


# Found along the class's ancestors, so a new leaf is answered like its parent.
ROWS: dict[type[Exception], Row] = {
    PromptTooLong: Row(400, INVALID, "context_length_exceeded"),
    RequestError: Row(400, INVALID, "invalid_value"),
    UnknownModel: Row(404, INVALID, "model_not_found"),
    NotReady: Row(503, DOWN, "model_loading", 5, "loading"),
    QueueFull: Row(503, DOWN, "queue_full", 2, "queue_full"),
    Draining: Row(503, DOWN, "draining", 5, "draining"),
    PackLost: Row(503, DOWN, "pack_lost", 30, "pack_lost", LOST),
    DeviceLost: Row(503, DOWN, "device_lost", 30, "device_lost"),
    EngineFailed: Row(503, DOWN, "engine_failed", 30, "engine_failed", GONE),
    Unavailable: Row(503, DOWN, "unavailable", 5, "unavailable"),
    GenerationFailed: Row(500, BROKEN, "generation_failed"),
}
HTTP_ROWS: dict[int, Row] = {
    400: Row(400, INVALID, "invalid_body"),
    401: Row(401, INVALID, "invalid_api_key"),
    404: Row(404, INVALID, "not_found"),
    405: Row(405, INVALID, "method_not_allowed"),
    408: Row(408, INVALID, "request_timeout"),
    413: Row(413, INVALID, "body_too_large", rejection="body_too_large"),
}
INTERNAL = Row(500, BROKEN, "internal_error", message="internal error; the log has more")
REJECTIONS = tuple(
    row.rejection for row in (*ROWS.values(), *HTTP_ROWS.values()) if row.rejection is not None
)

# For the OpenAPI document of a route.
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A field is missing, wrong or not supported"},
    401: {"model": ErrorResponse, "description": "No key, or not the right one"},
    404: {"model": ErrorResponse, "description": "No such model or path"},
    408: {"model": ErrorResponse, "description": "The request did not come in time"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    500: {"model": ErrorResponse, "description": "The request failed inside"},
    503: {
        "model": ErrorResponse,
        "description": "Loading, full, draining or failed; see Retry-After",
    },
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error, ready to be sent."""

    row: Row
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        error = ErrorObject(
            message=self.message[:MAX_MESSAGE_CHARS],
            type=self.row.type,
            param=self.param,
            code=self.row.code,
        )
        return ErrorResponse(error=error).model_dump()

    def response(self) -> JSONResponse:
        headers = dict(self.headers)
        if self.row.retry_after_s is not None:
            headers["Retry-After"] = str(self.row.retry_after_s)
        if self.row.code in ("engine_failed", "pack_lost", "device_lost"):
            headers["x-should-retry"] = "false"  # this process will not come back
        return JSONResponse(self.body(), self.row.status, headers)


def problem_of(error: Exception) -> Problem:
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, StarletteHTTPException):
        row = HTTP_ROWS.get(error.status_code, Row(error.status_code, INVALID, "http_error"))
        return Problem(row, str(error.detail), headers=error.headers or {})
    row = next((ROWS[kind] for kind in type(error).__mro__ if kind in ROWS), INTERNAL)
    return Problem(row, row.message or str(error), _param_of(error))


def _param_of(error: Exception) -> str | None:
    if isinstance(error, UnknownModel):
        return "model"
    if isinstance(error, PromptTooLong):
        return error.param or "prompt"
    return error.param if isinstance(error, RequestError) else None


def _of_validation(errors: Sequence[Any]) -> Problem:
    first = errors[0]
    if first["type"] == "json_invalid":
        return Problem(Row(400, INVALID, "invalid_json"), "the body is not valid JSON")
    param = first.get("ctx", {}).get("param")
    if param is not None:
        return Problem(Row(400, INVALID, _code_of(first["type"])), first["msg"], param)
    path = [str(step) for step in first["loc"][1:]]
    if not path:
        message = "the body must be a JSON object sent as Content-Type: application/json"
        return Problem(HTTP_ROWS[400], message)
    row = Row(400, INVALID, _code_of(first["type"]))
    return Problem(row, f"{'.'.join(path)}: {first['msg']}", path[0])


def _code_of(kind: str) -> str:
    codes = {"missing": "missing_required_parameter", UNSUPPORTED: UNSUPPORTED}
    return codes.get(kind, "invalid_value")


def state_problem(state: EngineState, failure: Exception | None = None) -> Problem:
    """Why the engine in this state takes no requests (any state but READY).

    `failure`, if any, is what ended it.
    """
    if isinstance(failure, EngineLost):
        return problem_of(failure)
    reasons: dict[EngineState, Exception] = {
        EngineState.LOADING: NotReady("the model is still loading"),
        EngineState.DRAINING: Draining("the server is shutting down"),
        EngineState.STOPPED: Draining("the server has shut down"),
    }
    return problem_of(reasons.get(state, EngineFailed(GONE)))


def _is_no_route(error: Exception) -> bool:
    """What the router raises for a path that it does not know."""
    return isinstance(error, StarletteHTTPException) and error.status_code == 404


def _of_path(request: Request) -> Problem:
    """Clients put /v1 twice, or expect a route that is not here: say which ones are."""
    served = ", ".join(request.app.openapi()["paths"])
    path = request.scope["path"][:MAX_PATH_CHARS]
    return Problem(HTTP_ROWS[404], f"there is no {path!r} here; served: {served}")


async def answer(request: Request, error: Exception) -> JSONResponse:
    """The one exception handler."""
    problem = _of_path(request) if _is_no_route(error) else problem_of(error)
    state = request.scope.get("state", {})
    if not state.get("accepted"):  # what the engine took is counted where it ends
        request.app.state.parts.metrics.refused(request.scope["path"], problem.row)
    request_id = state.get("request_id", "-")
    if problem.row.status == 500:
        log.error("request %s failed: %s", request_id, type(error).__name__)
    return problem.response()
