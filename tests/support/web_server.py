"""The real web server around a fake engine, in this process, on loopback."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

from fake_engine import FakeWorker
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app
from moestro.server.serving.lifecycle import WebServer


@contextlib.asynccontextmanager
async def serving(worker: FakeWorker, **settings: Any) -> AsyncIterator[str]:
    """Its URL; settings as keywords."""
    listener = socket.create_server(("127.0.0.1", 0))
    made = Settings(model="demo", **settings)
    server = WebServer(create_app(worker, made), made)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
