"""One client's connection: how long it may be silent, how many there may be, how it ends.

uvicorn's own protocol, which waits for a request's head and body without end, takes a half-closed
connection for a lost one, and accepts more than the process may open. Knows no routes.
"""

import asyncio
import logging
import resource
import socket
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from moestro.engine import EngineState
from moestro.server.api import KEEP_ALIVE
from moestro.server.contract import DOWN, HTTP_ROWS, Problem, Row, state_problem

log = logging.getLogger("moestro.server")

OWN_FILES = 64  # for all that is open besides connections; half, where there are fewer than twice
PROBE_S = 0.25  # doubled after each, up to the most
MOST_PROBE_S = 15.0
TOO_MANY = Problem(Row(503, DOWN, "too_many_connections", 2), "too many connections are open")


def connections_that_fit(wanted: int) -> int:
    """Raises the soft limit of open files as far as `wanted` needs and the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + OWN_FILES
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fit = min(wanted, max(soft - OWN_FILES, soft // 2))
    if fit < wanted:
        log.warning("at most %d connections: no more than %d files may be open", fit, soft)
    return fit


@dataclass(slots=True)
class Limits:
    """Of all connections of one server."""

    most_connections: int
    head_s: float
    body_s: float
    draining: bool = False  # whoever has been answered is let go


class Connection(H11Protocol):
    """Open by the client's leave, and as long as it says something in time.

    A client that has sent its request may close its side and still read. Whether it has left for
    good shows when something is written to it, so while its answer is made it is sent what clients
    pass over: a comment in a stream, "100 Continue" before a whole answer.
    """

    def __init__(
        self,
        limits: Limits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._awaited: object = None  # h11's state while the client is to speak
        self._patience: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._half_closed = False
        self._silent_since_s = self.loop.time()

    @property
    def awaits_client(self) -> bool:
        """No request of it is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does it only for sockets that name TCP as their protocol, which listeners do not.
        # Without it a small piece waits for the client's acknowledgement of the last: 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()
        if len(self.connections) > self._limits.most_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._silent_since_s = self.loop.time()
        self._watch()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """True keeps the connection open for the answer."""
        if self.awaits_client or self.transport.is_closing():
            return None
        self._half_closed = True
        self._probe_after(PROBE_S)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._patience, self._probe):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may have begun a request that was already there
        self._silent_since_s = self.loop.time()
        if self.conn.trailing_data[0] or not self.cycle.response_complete:
            self._watch()
        if self.awaits_client and (self._half_closed or self._limits.draining):
            self.transport.close()

    def shutdown(self) -> None:
        """Of the server: nobody is waited for, and what is answered is the last."""
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self.refuse(state_problem(EngineState.DRAINING))
        elif not self.transport.is_closing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self.refuse(Problem(HTTP_ROWS[400], msg))

    def refuse(self, problem: Problem) -> None:
        """The last that this connection hears, if nothing was said before."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # what the route still says goes nowhere
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = problem.response()
            own = self.server_state.default_headers
            headers = [*own, *response.raw_headers, (b"connection", b"close")]
            status = HTTPStatus(response.status_code)
            self._send(
                h11.Response(status_code=status, headers=headers, reason=status.phrase),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            )
        self.transport.close()

    def _send(self, *events: h11.Event) -> None:
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))

    def _watch(self) -> None:
        """Starts the clock when the client's turn begins, and stops it when that ends."""
        state = self.conn.their_state
        awaited = state if state in (h11.IDLE, h11.SEND_BODY) else None
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._patience is not None:
            self._patience.cancel()
        if awaited is not None:
            limit_s = self._limits.head_s if awaited is h11.IDLE else self._limits.body_s
            self._patience = self.loop.call_later(limit_s, self._out_of_patience)

    def _out_of_patience(self) -> None:
        if self._awaited is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # it never said anything
            return
        part = "head" if self._awaited is h11.IDLE else "body"
        self.refuse(Problem(HTTP_ROWS[408], f"the request's {part} did not come in time"))

    def _make_room(self) -> None:
        """The longest silent one goes; where all others are being answered, this one."""
        silent = [c for c in self.connections if isinstance(c, Connection) and c.awaits_client]
        longest = min(silent, key=lambda connection: connection._silent_since_s)
        if longest is self:
            self.refuse(TOO_MANY)
            return
        self.connections.discard(longest)
        longest.transport.abort()

    def _probe_after(self, delay_s: float) -> None:
        self._probe = self.loop.call_later(delay_s, self._probe_client, delay_s)

    def _probe_client(self, delay_s: float) -> None:
        """A client that is gone answers the first with a reset, at which the next fails."""
        if self.awaits_client or self.transport.is_closing():
            return
        if self.scope["state"].get("event_stream") and self.cycle.response_started:
            self._send(h11.Data(data=KEEP_ALIVE))
        elif not self.cycle.response_started and self.scope["http_version"] != "1.0":
            self._send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
        self._probe_after(min(2 * delay_s, MOST_PROBE_S))
