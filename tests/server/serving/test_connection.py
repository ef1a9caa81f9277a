"""Connections as a client can mistreat them: raw sockets on loopback, against the real server."""

import asyncio
import contextlib
import json
import logging
import resource
import socket
from collections.abc import AsyncIterator

import pytest

from fake_engine import FakeWorker, eventually, one_then_silence, within
from moestro.engine import EngineState, FinishReason, TokenEvent
from moestro.server.commands.listen import listening_socket
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app
from moestro.server.serving.connection import OWN_FILES, Connection, connections_that_fit
from moestro.server.serving.lifecycle import WebServer

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def post(body: bytes, length: int | None = None, version: bytes = b"1.1") -> bytes:
    head = b"POST /v1/completions HTTP/%s\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head % version + b"content-length: %d\r\n\r\n" % (length or len(body)) + body


ASK = post(b'{"prompt": "x"}')
ASK_STREAM = post(b'{"prompt": "x", "stream": true}')
HALF = post(b'{"prompt"', 500)


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(10):
            return await self._reader.readuntil(end)

    async def rest(self) -> bytes:
        """All up to the end of the connection."""
        async with asyncio.timeout(10):
            return await self._reader.read()


class Serving:
    def __init__(self, port: int, server: WebServer) -> None:
        self._port = port
        self.server = server
        self._clients: list[Client] = []

    async def client(self) -> Client:
        made = Client(*await asyncio.open_connection("127.0.0.1", self._port))
        self._clients.append(made)
        return made

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)

    def close(self) -> None:
        for client in self._clients:
            client.writer.close()


@contextlib.asynccontextmanager
async def server_for(worker: FakeWorker, **settings: object) -> AsyncIterator[Serving]:
    made = Settings.model_validate({"model": "demo", **settings})
    server = WebServer(create_app(worker, made), made)
    with listening_socket("127.0.0.1", 0) as listener:
        web = asyncio.create_task(server.serve(sockets=[listener]))
        serving = Serving(listener.getsockname()[1], server)
        try:
            yield serving
        finally:
            serving.close()
            server.should_exit = True
            await web


def problem_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_idle_connections_outlast_those_of_common_clients(worker):
    settings = Settings(model="demo")
    server = WebServer(create_app(worker, settings), settings)
    assert server.config.timeout_keep_alive == settings.idle_timeout >= 75


async def test_small_pieces_do_not_wait_for_acknowledgements(worker):
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(HEALTH)
        await client.until(b"}")
        (connection,) = serving.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_an_idle_connection_has_its_own_limit(worker):
    async with server_for(worker, idle_timeout=0.05, head_timeout=60) as serving:
        client = await serving.client()
        client.send(HEALTH)
        assert b"200 OK" in await client.until(b"}")
        assert await client.rest() == b""


async def test_idle_connections_close_when_the_server_drains_and_busy_ones_after_their_answer():
    release = asyncio.Event()

    async def waits(ids, params):
        yield TokenEvent(" a", (1,))
        await release.wait()
        yield TokenEvent(" b", (2,), FinishReason.STOP)

    worker = FakeWorker(waits)
    async with server_for(worker) as serving:
        idle, busy = await serving.client(), await serving.client()
        idle.send(HEALTH)
        await idle.until(b"}")
        busy.send(ASK_STREAM)
        await busy.until(b" a")
        serving.server.drain()
        assert await idle.rest() == b""
        release.set()
        assert b"[DONE]" in await busy.rest()
        late = await serving.client()
        late.send(HEALTH)
        assert b"200 OK" in await late.rest()


@pytest.mark.parametrize(
    ("said", "limit", "part"),
    [(b"GET /hea", "head_timeout", "head"), (HALF, "body_timeout", "body")],
)
async def test_a_request_that_does_not_come_in_time_is_a_408(worker, said, limit, part, caplog):
    async with server_for(worker, **{limit: 0.05}) as serving:
        client = await serving.client()
        client.send(said)
        answer = await client.rest()
        assert problem_of(answer) == (408, "request_timeout")
        assert part in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert not worker.submitted
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_second_request_s_head_has_the_limit_of_the_first(worker):
    async with server_for(worker, head_timeout=0.05) as serving:
        client = await serving.client()
        client.send(HEALTH)
        await client.until(b"}")
        client.send(b"GET ")
        assert problem_of(await client.rest()) == (408, "request_timeout")


async def test_a_connection_that_never_says_anything_is_closed(worker):
    async with server_for(worker, head_timeout=0.05) as serving:
        assert await (await serving.client()).rest() == b""


async def test_an_answer_may_take_longer_than_a_request():
    release = asyncio.Event()

    async def waits(ids, params):
        await release.wait()
        yield TokenEvent(" a", (1,), FinishReason.STOP)

    worker = FakeWorker(waits)
    async with server_for(worker, head_timeout=0.05, body_timeout=0.05) as serving:
        client, other = await serving.client(), await serving.client()
        client.send(ASK)
        assert await other.rest() == b""  # its time is over, and it was no shorter
        release.set()
        assert b"200 OK" in await client.until(b"\r\n\r\n")


async def test_silent_connections_make_room_for_those_that_speak(worker):
    async with server_for(worker, max_connections=4) as serving:
        silent = [await serving.client() for _ in range(3)]
        half = await serving.client()
        half.send(HALF)
        await eventually(lambda: serving.open == 4)
        for _ in range(6):
            client = await serving.client()
            client.send(HEALTH)
            assert b"200 OK" in await client.until(b"}")
            assert serving.open <= 4
        for gone in (*silent, half):
            with contextlib.suppress(ConnectionResetError):
                assert await gone.rest() == b""


async def test_where_all_are_being_answered_the_next_is_told():
    worker = FakeWorker(one_then_silence)
    async with server_for(worker, max_connections=2) as serving:
        busy = [await serving.client() for _ in range(2)]
        for client in busy:
            client.send(ASK_STREAM)
            await client.until(b" a")
        assert problem_of(await (await serving.client()).rest()) == (503, "too_many_connections")
        assert len(worker.open) == 2


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(monkeypatch, caplog):
    limits = [64, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(2), new))
    assert connections_that_fit(100) == 100
    assert limits == [100 + OWN_FILES, 1024]
    assert connections_that_fit(1024) == 1024 - OWN_FILES
    assert limits == [1024, 1024]
    assert "no more than 1024 files" in caplog.text
    limits[:] = [64, 64]
    assert connections_that_fit(1024) == 32
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert connections_that_fit(1024) == 1024


@pytest.mark.parametrize("ask", [ASK, ASK_STREAM, post(b'{"prompt": "x"}', version=b"1.0")])
async def test_a_client_that_has_said_all_is_served(ask):
    release = asyncio.Event()

    async def waits(ids, params):
        yield TokenEvent(" a", (1,))
        await release.wait()
        yield TokenEvent(" force", (2,), FinishReason.STOP)

    worker = FakeWorker(waits)
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(ask)
        client.writer.write_eof()
        await eventually(lambda: len(worker.submitted) == 1)
        if ask is ASK:
            assert b"100 Continue" in await client.until(b"\r\n\r\n")  # asked whether it is there
        elif ask is ASK_STREAM:
            await client.until(b": keep-alive")
        release.set()
        answer = await client.rest()
        assert b"200 OK" in answer or ask is ASK_STREAM
        assert b" force" in answer
        assert not worker.open


@pytest.mark.parametrize("ask", [ASK, ASK_STREAM])
async def test_a_client_that_said_all_and_then_leaves_is_noticed(ask):
    worker = FakeWorker(one_then_silence)
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(ask)
        client.writer.write_eof()
        await eventually(lambda: len(worker.submitted) == 1)
        client.writer.close()
        await within(10, worker.submitted[0].stream.cancelled.wait())
        assert worker.idle


async def test_a_client_that_ends_in_the_middle_of_its_request_is_not_waited_for(worker):
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(HALF)
        client.writer.write_eof()
        assert await client.rest() == b""
    assert not worker.submitted


async def test_a_half_sent_request_is_told_of_the_stop(worker, caplog):
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(HALF)
        await eventually(lambda: len(serving.server.server_state.tasks) == 1)
        worker.state = EngineState.DRAINING
        serving.server.drain()
        assert problem_of(await client.rest()) == (503, "draining")
        await eventually(lambda: not serving.server.server_state.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_stop_cuts_who_does_not_read_without_a_traceback(monkeypatch, caplog):
    monkeypatch.setattr("moestro.server.serving.lifecycle.CONNECTIONS_GRACE_S", 0.05)

    async def floods(ids, params):
        while True:
            yield TokenEvent("x" * 100_000, (1,))

    worker = FakeWorker(floods)
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(ASK_STREAM)
        await client.until(b"\r\n\r\n")
        (connection,) = serving.server.server_state.connections
        assert isinstance(connection, Connection)
        reading = client.writer.transport
        assert isinstance(reading, asyncio.Transport)
        reading.pause_reading()
        await eventually(lambda: connection.flow.write_paused)
        serving.server.should_exit = True
        await within(10, worker.submitted[0].stream.cancelled.wait())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_what_is_no_http_is_answered_in_the_api_s_shape(worker):
    async with server_for(worker) as serving:
        client = await serving.client()
        client.send(b"\x16\x03\x01 hello\r\n\r\n")
        assert problem_of(await client.rest()) == (400, "invalid_body")
