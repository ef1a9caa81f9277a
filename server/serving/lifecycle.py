"""From a bound socket to an exit code.

LOADING --ready--> SERVING --signal--> DRAINING --idle or grace over--> STOPPED
   |  \\--failed--> exit 2                 |
   \\--signal--> STOPPED                   \\--second signal--> the process ends at once

SIGTERM and SIGHUP: 0 after a clean drain, 1 when requests had to be cut or the engine had died.
SIGINT: 130. Second: 143, 129 or 130. A pack or a GPU that is lost: 1, for a supervisor to start it
again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from moestro.engine import EngineLost, EngineState
from moestro.server.contract import Worker
from moestro.server.facts import Settings

from .app import create_app
from .connection import Connection, Limits, connections_that_fit

log = logging.getLogger("moestro.server")

POLL_S = 0.05
WATCH_S = 1.0  # between two looks at an engine that serves
CONNECTIONS_GRACE_S = 5  # for answers that are complete but not yet read
BACKLOG = 2048
# asyncio accepts this many before it looks at any of them, and logs as many errors where the
# process may not open more files.
ACCEPTED_AT_ONCE = 1


class WebServer(uvicorn.Server):
    """uvicorn with our connections; its signals are the life cycle's."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._limits = Limits(
            connections_that_fit(settings.max_connections),
            head_s=settings.head_timeout,
            body_s=settings.body_timeout,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, self._limits),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=settings.idle_timeout,  # type: ignore[arg-type]
                timeout_graceful_shutdown=2 * CONNECTIONS_GRACE_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # the number above became the system's queue, too

    def drain(self) -> None:
        """Idle connections close now, the others after their answer."""
        self._limits.draining = True
        for connection in list(self.server_state.connections):
            connection.shutdown()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        cutting = loop.call_later(CONNECTIONS_GRACE_S, self._cut)
        self._limits.draining = True
        await super().shutdown(sockets)
        cutting.cancel()

    def _cut(self) -> None:
        """Before uvicorn would cancel their routes, which is no quiet end."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class Lifecycle:
    """Runs once. `on_ready` is called when the model is loaded, `on_failed` when it cannot be."""

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        listener: socket.socket,
        on_ready: Callable[[], None],
        on_failed: Callable[[str], None],
        abort: Callable[[int], object] = os._exit,  # whatever still hangs, hangs no more
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._listener = listener
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._abort = abort
        self._signalled = asyncio.Event()
        self._code = 0
        self._server = WebServer(create_app(worker, settings), settings)

    async def run(self) -> int:
        """The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup: the terminal may go, the server serves on
            loop.add_signal_handler(number, self._on_signal, number)
        self._worker.start()
        web = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        try:
            await self._load(web)
            if self._worker.state is EngineState.FAILED and not self._signalled.is_set():
                self._on_failed(str(self._worker.failure))
                self._code = 2
            elif not self._signalled.is_set():
                self._on_ready()
                await self._until_signal(web)
            if self._worker.state is EngineState.READY:
                await self._drain()
            if self._worker.state is EngineState.FAILED:  # maybe while it drained
                self._code = self._code or 1
        finally:
            await self._close(web)
        return self._code

    def _on_signal(self, number: signal.Signals) -> None:
        interrupted = number == signal.SIGINT
        if self._signalled.is_set():
            sys.stderr.write("moestro: stopped at once\n")
            sys.stderr.flush()
            self._abort(128 + number)
        self._code = 130 if interrupted else 0
        self._signalled.set()

    async def _load(self, web: "asyncio.Task[None]") -> None:
        while self._worker.state is EngineState.LOADING:
            if self._signalled.is_set() or web.done():
                return
            await asyncio.sleep(POLL_S)

    async def _until_signal(self, web: "asyncio.Task[None]") -> None:
        waiting = asyncio.ensure_future(self._signalled.wait())
        while not (waiting.done() or web.done() or isinstance(self._worker.failure, EngineLost)):
            await asyncio.wait({waiting, web}, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if isinstance(self._worker.failure, EngineLost):  # a new start may mend it
            self._on_failed(str(self._worker.failure))

    async def _drain(self) -> None:
        """New work is refused, running work may finish."""
        self._worker.drain()
        self._server.drain()
        grace_s = self._settings.drain_grace
        if not self._worker.idle:
            log.info("finishing running requests, at most %.0f s; again to stop at once", grace_s)
        end_s = asyncio.get_running_loop().time() + grace_s
        while not self._worker.idle and asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(POLL_S)
        if not self._worker.idle:
            log.warning("requests still ran after %.0f s and were cut", grace_s)
            self._code = self._code or 1

    async def _close(self, web: "asyncio.Task[None]") -> None:
        # In a thread: what is cut gets its last event through this loop.
        await asyncio.to_thread(self._worker.stop)
        self._server.should_exit = True
        await web
