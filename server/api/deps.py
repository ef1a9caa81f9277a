"""What routes are given."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from moestro.server.contract import Worker
from moestro.server.facts import Settings
from moestro.server.metrics import ServerMetrics


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
