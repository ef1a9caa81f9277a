"""Health, readiness and the page of metrics."""

import threading

import httpx
import pytest

from moestro.engine import EngineFailed, EngineState, Progress


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
    """Minutes, when a prompt's experts come from a slow disk; but no scrape waits for its end."""
    worker.heartbeat_age_s = 300.0
    assert (await client.get("/health")).status_code == 200
    assert "moestro_engine_heartbeat_age_seconds 300.0" in (await client.get("/metrics")).text
    assert not worker.stats_threads


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


async def test_metrics_are_asked_for_outside_the_event_loop(client, worker):
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert worker.stats_threads and threading.current_thread() not in worker.stats_threads
