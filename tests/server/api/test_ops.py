"""Health, readiness and the page of metrics."""

import asyncio
from importlib.metadata import version

import httpx
import pytest

from fake_engine import eventually
from moestro.engine import DeviceLost, EngineFailed, EngineState, PackLost, Progress
from moestro.server.api import ops


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        (EngineState.LOADING, 200, 503),
        (EngineState.READY, 200, 200),
        (EngineState.DRAINING, 200, 503),
        (EngineState.STOPPED, 503, 503),
        (EngineState.FAILED, 503, 503),
    ],
)
async def test_states(client, worker, state, health, ready):
    worker.state = state
    assert (await client.get("/health")).status_code == health
    response = await client.get("/ready")
    assert response.status_code == ready
    assert response.json()["state"] == state.value
    if ready == 503:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["retry-after"]


@pytest.mark.parametrize("path", ["/ready", "/health"])
async def test_a_pack_that_is_lost_is_said(client, worker, path):
    worker.fail(PackLost("/secret/place.pack is damaged"))
    response = await client.get(path)
    assert response.status_code == 503
    error = response.json()["error"]
    assert error["code"] == "pack_lost"
    assert "file of the experts cannot be read" in error["message"]
    assert "/secret" not in response.text
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ["/ready", "/health"])
async def test_a_gpu_that_is_lost_is_said_with_its_reason(client, worker, path):
    worker.fail(DeviceLost("cuda:0 failed: CUDA error: illegal address"))
    response = await client.get(path)
    assert response.status_code == 503
    error = response.json()["error"]
    assert (error["code"], error["message"]) == (
        "device_lost",
        "cuda:0 failed: CUDA error: illegal address",
    )
    assert response.headers["x-should-retry"] == "false"


async def test_ready_shows_progress(client, worker):
    worker.state = EngineState.LOADING
    worker.progress_now = Progress("pack", 3, 30, "layers")
    body = (await client.get("/ready")).json()
    assert body["progress"] == {"phase": "pack", "done": 3, "total": 30, "unit": "layers"}


async def test_a_stuck_engine_is_not_healthy(client, worker):
    worker.heartbeat_age_s = 601.0
    response = await client.get("/health")
    assert response.status_code == 503
    assert "601 s" in response.json()["error"]["message"]


async def test_a_slow_step_is_not_a_stuck_engine(client, worker):
    """Minutes, when a prompt's experts come from a slow disk."""
    worker.heartbeat_age_s = 300.0
    assert (await client.get("/health")).status_code == 200
    assert "moestro_engine_heartbeat_age_seconds 300.0" in (await client.get("/metrics")).text


async def test_no_scrape_waits_for_the_end_of_a_step(client, worker, monkeypatch):
    """More scrapes than the thread pool has threads: none of them holds one."""
    monkeypatch.setattr(ops, "FRESH_WITHIN_S", 0.05)
    worker.in_a_step = True
    async with asyncio.timeout(5):
        pages = await asyncio.gather(*(client.get("/metrics") for _ in range(60)))
    assert len(worker.questions) == 60 and not any(asked.done() for asked in worker.questions)
    assert all('moestro_engine_steps_total{phase="decode"} 37.0' in page.text for page in pages)


async def test_a_text_prompt_passes_waiting_scrapes(client, worker, monkeypatch):
    monkeypatch.setattr(ops, "FRESH_WITHIN_S", 60.0)
    worker.in_a_step = True
    scrapes = [asyncio.create_task(client.get("/metrics")) for _ in range(60)]
    await eventually(lambda: len(worker.questions) == 60)
    async with asyncio.timeout(5):
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    for asked in worker.questions:
        asked.set_result(worker.snapshot)
    assert {page.status_code for page in await asyncio.gather(*scrapes)} == {200}


@pytest.mark.parametrize("state", [EngineState.READY, EngineState.FAILED])
@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_head_is_answered_like_get(serving, worker, state, path):
    worker.state = state
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        whole, head = await client.get(path), await client.head(path)
    assert head.status_code == whole.status_code
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert head.content == b""


async def test_failure_keeps_its_details(client, worker):
    worker.fail(EngineFailed("boom in /some/path"))
    for path in ("/health", "/ready"):
        response = await client.get(path)
        assert "/some/path" not in response.text
        assert response.headers["x-should-retry"] == "false"


async def test_metrics_are_text(client):
    assert (await client.get("/metrics")).headers["content-type"].startswith("text/plain")


async def test_the_version_is_said_to_whoever_has_the_key(client_for):
    client = client_for(api_key="right")
    assert (await client.get("/version")).status_code == 401
    response = await client.get("/version", headers={"authorization": "Bearer right"})
    assert response.json() == {"version": version("moestro")}
