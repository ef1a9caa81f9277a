"""Puts the server together once the flags are good and the port is taken."""

import asyncio
import gc
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import typer
from rich.console import Console

from moestro.engine import EngineState, EngineWorker, ProgressFn, refuse_by_config
from moestro.server.facts import Settings, refusal_line
from moestro.server.serving import Lifecycle

from .console import progress_view, set_up_logging
from .listen import is_loopback, url_of
from .output import outlive_readers

log = logging.getLogger("moestro.server")


@contextmanager
def watched_progress() -> Iterator[ProgressFn]:
    """Logging and progress on stderr for as long as the block runs."""
    console = Console(stderr=True)
    set_up_logging(console)
    view = progress_view(console)
    try:
        yield view
    finally:
        view.close()


def run_server(settings: Settings, listener: socket.socket, began_s: float) -> int:
    """The exit code, after the server has served. `began_s`: time.monotonic() of the start."""
    outlive_readers()
    console = Console(stderr=True)
    set_up_logging(console)
    view = progress_view(console)
    warn_if_open(settings)
    worker = EngineWorker(settings.to_engine_config(), view, prepare_of(settings))
    url = url_of(listener)

    def on_ready() -> None:
        # what was loaded stays: the collector would walk all of it again and again
        gc.collect()
        gc.freeze()
        view.close()
        typer.echo(ready_text(settings, url, time.monotonic() - began_s))

    def on_failed(message: str) -> None:
        view.close()
        typer.echo(refusal_line(message), err=True)

    async def serve() -> int:
        return await Lifecycle(worker, settings, listener, on_ready, on_failed).run()

    log.info("listening on %s, loading %s", url, settings.served_name)
    try:
        code = asyncio.run(serve())
    finally:
        view.close()
    leave_for_good(worker.state, code)
    return code


def leave_for_good(state: EngineState, code: int) -> None:
    """An engine thread that did not stop in time would keep the process alive."""
    if state not in (EngineState.STOPPED, EngineState.FAILED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare_of(settings: Settings) -> Callable[[ProgressFn], Path] | None:
    """How the model's folder comes about, where it is not simply there."""
    name = settings.hub_name
    if name is not None:
        from moestro.server.hub import fetch_model

        def check(folder: Path) -> None:
            refuse_by_config(replace(settings.to_engine_config(), model_path=folder))

        return partial(fetch_model, name, check=check, pack_dir=settings.cache_dir)
    if not settings.is_demo:
        return None
    from moestro.factorize import prepare_demo

    return partial(prepare_demo, settings.cache_dir)


def warn_if_open(settings: Settings) -> None:
    if not settings.keys and not is_loopback(settings.host):
        log.warning(
            "listening on %s without a key: whoever reaches this port can use the model; "
            "set --api-key, --api-key-file or MOESTRO_API_KEY",
            settings.host,
        )


def ready_text(settings: Settings, url: str, seconds: float) -> str:
    """What to try next, ready to be copied."""
    body = {
        "model": settings.served_name,
        "prompt": "Gravity is",
        "max_tokens": 32,
        "temperature": 0,
    }
    key = "" if not settings.keys else '-H "Authorization: Bearer $MOESTRO_API_KEY" '
    return "\n".join(
        (
            f"moestro {version('moestro')} serves {settings.served_name!r} at {url}/v1, "
            f"ready after {seconds:.1f} s",
            "",
            f"  curl {url}/v1/completions -H 'Content-Type: application/json' {key}\\",
            f"    -d {shlex.quote(json.dumps(body))}",
            "",
            f'  pieces as they come: curl -N, "stream": true   metrics: {url}/metrics',
            "  stop: Ctrl-C",
        )
    )
