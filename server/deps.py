"""What routes are given. The engine appears here as the few members that the server uses."""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import Depends, Request

from moestro.engine import (
    EngineError,
    EngineState,
    EngineStats,
    ModelInfo,
    Progress,
    SamplingParams,
    TokenEvent,
)

from .metrics import ServerMetrics
from .settings import Settings


class Tokens(Protocol):
    """The model's tokenizer; safe in any thread."""

    def encode(self, text: str) -> list[int]: ...


class Stream(Protocol):
    """The events of one request; ends with the one that has a finish reason."""

    @property
    def prompt_tokens(self) -> int: ...
    def __anext__(self) -> Awaitable[TokenEvent]: ...
    def cancel(self) -> None: ...


class Worker(Protocol):
    """`moestro.engine.EngineWorker`, or a fake of it in tests."""

    @property
    def state(self) -> EngineState: ...
    @property
    def failure(self) -> EngineError | None: ...
    @property
    def progress_now(self) -> Progress | None: ...
    @property
    def model(self) -> ModelInfo: ...
    @property
    def tokenizer(self) -> Tokens: ...
    @property
    def heartbeat_age_s(self) -> float: ...
    @property
    def idle(self) -> bool: ...
    def start(self) -> None: ...
    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Stream: ...
    def stats(self) -> EngineStats: ...
    def drain(self) -> None: ...
    def stop(self, timeout_s: float = ...) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """The collaborators of one application."""

    worker: Worker
    settings: Settings
    metrics: ServerMetrics


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def _worker(request: Request) -> Worker:
    return (await _parts(request)).worker


async def _settings(request: Request) -> Settings:
    return (await _parts(request)).settings


async def _metrics(request: Request) -> ServerMetrics:
    return (await _parts(request)).metrics


PartsDep = Annotated[Parts, Depends(_parts)]
WorkerDep = Annotated[Worker, Depends(_worker)]
SettingsDep = Annotated[Settings, Depends(_settings)]
MetricsDep = Annotated[ServerMetrics, Depends(_metrics)]
