"""What the server exports, read off the page it really answers with."""

import asyncio

import httpx
import pytest

from exposition import Exported, read_exposition
from fake_engine import FakeWorker
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app


async def scrape() -> str:
    app = create_app(FakeWorker(), Settings(model="demo"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://server"
    ) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    return answer.text


@pytest.fixture(scope="session")
def metrics_page() -> str:
    return asyncio.run(scrape())


@pytest.fixture(scope="session")
def exported(metrics_page: str) -> Exported:
    return read_exposition(metrics_page)
