"""An application around a fake engine, a client that speaks to it, and a real server for both."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny
from fake_engine import FakeWorker
from moestro.engine import EngineConfig, EngineState, EngineWorker
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app
from web_server import serving

ClientFactory = Callable[..., httpx.AsyncClient]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HOST", "PORT", "API_KEY", "CACHE_DIR", "HOST_MEMORY"):
        monkeypatch.delenv(f"MOESTRO_{name}", raising=False)
    yield


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def client_for(worker: FakeWorker) -> ClientFactory:
    """In-process; settings as keywords."""

    def make(**settings: Any) -> httpx.AsyncClient:
        app = create_app(worker, Settings(model="demo", **settings))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://moestro.test")

    return make


@pytest.fixture
def client(client_for: ClientFactory) -> httpx.AsyncClient:
    return client_for()


@pytest.fixture(name="serving")
def _serving() -> Callable[..., contextlib.AbstractAsyncContextManager[str]]:
    """`async with serving(worker) as url`: a real uvicorn on loopback."""
    return serving


@contextlib.asynccontextmanager
async def served(worker: EngineWorker, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application around a real engine, in this process."""
    app = create_app(worker, Settings(model="demo", **settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://moestro.test", timeout=60
    ) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.build("qwen3_moe", tmp_path_factory.mktemp("served") / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    return folder


@pytest.fixture(scope="session")
def tiny_worker(tiny_folder: Path) -> Iterator[EngineWorker]:
    """A real engine on a random model of 260 tokens, 256 of them bytes."""
    config = EngineConfig(
        tiny_folder, tiny_folder.parent / "cache", kv_memory_bytes=1 << 20, threads=1
    )
    running = EngineWorker(config, lambda _: None)
    running.start()
    assert running.wait_loaded(60) and running.state is EngineState.READY, running.failure
    yield running
    running.stop()


@pytest.fixture
async def tiny_client(tiny_worker: EngineWorker) -> AsyncIterator[httpx.AsyncClient]:
    async with served(tiny_worker) as client:
        yield client
