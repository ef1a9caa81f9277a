"""/health, /ready and /metrics, for machines that watch this one and need no key; /version."""

import asyncio
import contextlib
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from moestro.engine import EngineFailed, EngineState, Unavailable
from moestro.server.contract import ErrorResponse, Problem, Worker, problem_of, state_problem

from .deps import MetricsDep, SettingsDep, WorkerDep

FRESH_WITHIN_S = 0.25  # how long a page of metrics waits for the engine's step in progress

router = APIRouter()

_UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"model": ErrorResponse, "description": "Not now"}
}


@router.get("/health", responses=_UNAVAILABLE)
async def health(worker: WorkerDep, settings: SettingsDep) -> JSONResponse:
    """Alive: 200 also while loading or draining; 503 when the engine died or is stuck."""
    if worker.state in (EngineState.STOPPED, EngineState.FAILED):
        return _refusal(state_problem(worker.state, worker.failure), worker)
    age_s = worker.heartbeat_age_s
    # A start has long steps of its own (imports, a big read); only a running loop must turn.
    if worker.state is not EngineState.LOADING and age_s > settings.stuck_after:
        row = problem_of(EngineFailed()).row
        return _refusal(Problem(row, f"the engine has not moved for {age_s:.0f} s"), worker)
    return JSONResponse(
        {"status": "ok", "state": worker.state.value, "heartbeat_age_s": round(age_s, 3)}
    )


@router.get("/ready", responses=_UNAVAILABLE)
async def ready(worker: WorkerDep) -> JSONResponse:
    """Send requests here: 200 only when they are served at once."""
    if worker.state is EngineState.READY:
        return JSONResponse({"status": "ready", "state": worker.state.value})
    return _refusal(state_problem(worker.state, worker.failure), worker)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(metrics: MetricsDep, worker: WorkerDep) -> Response:
    """Prometheus text. In a step that is long, with the numbers from before it."""
    await _fresh_stats(worker)
    text = await run_in_threadpool(metrics.text)  # thousands of lines: not on the event loop
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class Version(BaseModel):
    version: str


@router.get("/version")
async def show_version() -> Version:
    """Of moestro."""
    return Version(version=version("moestro"))


async def _fresh_stats(worker: Worker) -> None:
    """Waits a moment for the step in progress; on the event loop, where waiting costs no thread."""
    with contextlib.suppress(Unavailable, TimeoutError):
        asked = asyncio.wrap_future(worker.ask_stats())
        await asyncio.wait_for(asyncio.shield(asked), FRESH_WITHIN_S)


def _refusal(problem: Problem, worker: Worker) -> JSONResponse:
    """The error, with the state and how far the start has come."""
    progress = worker.progress_now if worker.state is EngineState.LOADING else None
    response = problem.response()
    body = {
        **problem.body(),
        "state": worker.state.value,
        "progress": None if progress is None else asdict(progress),
    }
    headers = {
        name: value
        for name, value in response.headers.items()
        if name not in ("content-length", "content-type")
    }
    return JSONResponse(body, response.status_code, headers)
