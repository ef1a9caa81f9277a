"""Health, readiness and the page of metrics."""

import threading

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
    worker.heartbeat_age_s = 61.0
    response = await client.get("/health")
    assert response.status_code == 503
    assert "61 s" in response.json()["error"]["message"]


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
