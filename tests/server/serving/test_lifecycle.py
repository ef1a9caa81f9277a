"""Signals, draining and exit codes: the life cycle in this process, the signals real."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest

from fake_engine import FakeWorker, eventually, one_then_silence, within
from moestro.engine import DeviceLost, EngineFailed, EngineState, PackLost, StartError
from moestro.server.commands.listen import listening_socket, url_of
from moestro.server.facts.settings import Settings
from moestro.server.serving.lifecycle import Lifecycle

BODY = {"prompt": "x", "stream": True}


def codes(stopped: int) -> list[tuple[signal.Signals, int]]:
    """Exit codes by signal where a server that is stopped ends with `stopped`."""
    return [(signal.SIGINT, 130), (signal.SIGTERM, stopped), (signal.SIGHUP, stopped)]


@dataclass
class Life:
    """A life cycle that runs beside the test."""

    worker: FakeWorker
    client: httpx.AsyncClient
    code: "asyncio.Task[int]"
    said: list[str] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)

    async def answered(self, path: str, status: int) -> None:
        async with asyncio.timeout(5):
            while (await self.client.get(path)).status_code != status:
                await asyncio.sleep(0.01)

    async def exit_code(self) -> int:
        await within(10, asyncio.wait({self.code}))
        return self.code.result()


@contextlib.asynccontextmanager
async def life(state: EngineState = EngineState.READY, grace_s: float = 30) -> AsyncIterator[Life]:
    worker = FakeWorker(one_then_silence, state=state)
    listener = listening_socket("127.0.0.1", 0)
    said: list[str] = []
    aborted: list[int] = []
    lifecycle = Lifecycle(
        worker,
        Settings(model="demo", drain_grace=grace_s),
        listener,
        on_ready=lambda: said.append("ready"),
        on_failed=said.append,
        abort=aborted.append,
    )
    async with httpx.AsyncClient(base_url=url_of(listener)) as client:
        code = asyncio.create_task(lifecycle.run())
        try:
            yield Life(worker, client, code, said, aborted)
        finally:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            code.cancel()
            await asyncio.wait({code})


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def test_loading_then_ready_then_gone():
    async with life(EngineState.LOADING) as it:
        await it.answered("/health", 200)
        await it.answered("/ready", 503)
        assert not it.said
        it.worker.state = EngineState.READY
        await it.answered("/ready", 200)
        await eventually(lambda: it.said == ["ready"])
        send(signal.SIGTERM)
        assert await it.exit_code() == 0
        assert it.worker.stops == 1
        with pytest.raises(httpx.ConnectError):
            await it.client.get("/health")


async def test_a_start_that_fails_is_2():
    async with life(EngineState.LOADING) as it:
        await it.answered("/health", 200)
        it.worker.fail(StartError("the model is broken"))
        assert await it.exit_code() == 2
        assert it.said == ["the model is broken"]


@pytest.mark.parametrize(("number", "code"), codes(1))
async def test_an_engine_that_died_is_no_clean_end(number, code):
    async with life() as it:
        await it.answered("/ready", 200)
        it.worker.fail(EngineFailed("the engine died"))
        await it.answered("/health", 503)
        send(number)
        assert await it.exit_code() == code


@pytest.mark.parametrize("kind", [PackLost, DeviceLost])
async def test_what_a_new_start_may_mend_ends_the_process_for_a_supervisor(kind):
    async with life() as it:
        await it.answered("/ready", 200)
        it.worker.fail(kind("what is lost"))
        assert await it.exit_code() == 1
        assert it.said == ["ready", "what is lost"]


async def test_an_engine_that_dies_while_it_drains_is_no_clean_end():
    async with (
        life() as it,
        it.client.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        lines = response.aiter_lines()
        await within(5, anext(lines))
        send(signal.SIGTERM)
        await it.answered("/ready", 503)
        it.worker.fail(EngineFailed("the engine died"))
        it.worker.open.clear()  # as the engine does: nothing runs any more
        assert await it.exit_code() == 1


@pytest.mark.parametrize(("number", "code"), codes(0))
async def test_signals_while_loading(number, code):
    async with life(EngineState.LOADING) as it:
        await it.answered("/health", 200)
        send(number)
        assert await it.exit_code() == code
        assert it.worker.stops == 1
        assert not it.said


@pytest.mark.parametrize(("number", "code"), codes(0))
async def test_running_work_finishes_and_new_work_is_refused(number, code):
    async with life() as it:
        async with it.client.stream("POST", "/v1/completions", json=BODY) as response:
            lines = response.aiter_lines()  # kept: an iterator that goes closes the response
            await within(5, anext(lines))
            send(number)
            await it.answered("/ready", 503)
            refused = await it.client.post("/v1/completions", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"]
            await it.answered("/health", 200)
            assert not it.code.done()
        # The client has let go of the last request: nothing is left to wait for.
        assert await it.exit_code() == code


async def test_work_that_outlasts_the_grace_is_told_so():
    async with (
        life(grace_s=0.2) as it,
        it.client.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        lines = response.aiter_lines()
        await within(5, anext(lines))
        send(signal.SIGTERM)
        text = "\n".join([line async for line in lines])
        assert "shutting down" in text and "[DONE]" not in text
        assert await it.exit_code() == 1


@pytest.mark.parametrize(("number", "code"), [*codes(143)[:2], (signal.SIGHUP, 129)])
async def test_a_second_signal_ends_it_at_once(number, code):
    async with (
        life() as it,
        it.client.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        lines = response.aiter_lines()
        await within(5, anext(lines))
        send(signal.SIGTERM)
        await it.answered("/ready", 503)
        assert not it.aborted
        send(number)
        await eventually(lambda: it.aborted == [code])


async def test_a_hang_up_that_is_ignored_from_outside_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        async with life() as running:
            await running.answered("/ready", 200)
            send(signal.SIGHUP)
            await running.answered("/ready", 200)
            send(signal.SIGTERM)
            assert await running.exit_code() == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
