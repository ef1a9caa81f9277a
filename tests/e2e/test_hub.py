"""`moestro plan org/name` and `moestro serve org/name` as processes, against a hub on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from transformers import LlamaConfig

import tiny
from fake_hub import COMMIT, FakeHub, Fault, blob_of, fake_hub
from server_process import ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("hub") / "files")


@pytest.fixture
def hub(source: Path) -> Iterator[FakeHub]:
    with fake_hub({"org/tiny": source}) as running:
        yield running


Environment = dict[str, str]


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> Environment:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "secret",
        "MOESTRO_CACHE_DIR": str(tmp_path / "cache"),
        "MOESTRO_THREADS": "1",
    }


def planned(environment: Environment, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moestro.server", "plan", *words, "--disk-speed", "1GB"]
    return subprocess.run(
        command,
        env=os.environ | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def served(environment: Environment, model: str) -> ServerProcess:
    budgets = ("--host-memory", "600KiB", "--kv-memory", "1MiB")
    return ServerProcess(model, *budgets, environment=environment)


def test_a_plan_fetches_the_config_alone(hub: FakeHub, environment: Environment) -> None:
    plan = planned(environment, "org/tiny")
    assert plan.returncode == 0, plan.stderr
    assert "mixtral: 4 layers of 8 experts" in plan.stdout
    assert "the weights are not here" in plan.stdout
    assert hub.fetched() == ["config.json"]
    tokens = {one.token for one in hub.asked if "org/tiny" in one.path}
    assert tokens == {"Bearer secret"}


def test_it_is_served_under_its_name_and_then_without_a_connection(
    hub: FakeHub, environment: Environment
) -> None:
    hub.faults.append(Fault("/stored/", cut_after_bytes=300_000))
    texts = []
    for _ in range(2):
        server = served(environment, "org/tiny")
        try:
            server.wait_ready()
            models = httpx.get(f"{server.url}/v1/models", timeout=30).json()
            assert [model["id"] for model in models["data"]] == ["org/tiny"]
            answer = server.complete("Hello", model="org/tiny", max_tokens=8)
            assert answer.status_code == 200
            texts.append(answer.json()["choices"][0]["text"])
            server.signal(signal.SIGTERM)
            assert server.wait_exit() == 0
        finally:
            server.process.kill()
            server.wait_exit()
        hub.stop()
    assert texts[0] == texts[1]
    assert "taken as it is in the cache" in server.log
    folder = Path(environment["HF_HOME"]) / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    plan = planned(environment | {"HF_HUB_OFFLINE": "1"}, str(folder))
    assert plan.returncode == 0, plan.stderr
    assert "the weights are not here" not in plan.stdout


def test_what_it_refuses_is_one_line(hub: FakeHub, environment: Environment) -> None:
    hub.gate = "another"
    server = served(environment, "org/tiny")
    assert server.wait_exit(120) == 2
    said = [line for line in server.lines if line.startswith("moestro: ")]
    [line] = [line for line in said if not line.startswith("moestro: warning: ")]
    assert "org/tiny is gated and the token that is set has no access" in line
    assert "secret" not in server.log
    offline = planned(environment | {"HF_HUB_OFFLINE": "1"}, "org/other")
    assert offline.returncode == 2
    assert "org/other is not in" in offline.stderr and "HF_HUB_OFFLINE is set" in offline.stderr


def test_a_dense_model_is_refused_before_its_weights_are_fetched(
    hub: FakeHub, environment: Environment, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    LlamaConfig(**tiny.WIDTHS).save_pretrained(dense)
    (dense / "model.safetensors").write_bytes(b"never read")
    hub.repositories["org/dense"] = dense
    server = served(environment, "org/dense")
    assert server.wait_exit(120) == 2
    assert "if it is dense, split it with `moestro factorize`" in server.log
    assert hub.fetched() == ["config.json"]


def test_an_interrupted_download_goes_on_at_the_next_start(
    hub: FakeHub, source: Path, environment: Environment
) -> None:
    hub.faults.append(Fault("/stored/", cut_after_bytes=700_000, stalls=True))
    server = served(environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, "org/tiny")
    blobs = Path(environment["HF_HOME"]) / "hub" / "models--org--tiny" / "blobs"
    partial = blobs / f"{blob_of(source / 'model.safetensors')}.moestro-partial"
    wait_for(lambda: partial.is_file() and partial.stat().st_size > 0)
    ready = httpx.get(f"{server.url}/ready", timeout=30)
    assert ready.status_code == 503
    server.signal(signal.SIGINT)
    assert server.wait_exit(60) == 130
    kept_bytes = partial.stat().st_size
    hub.asked.clear()
    server = served(environment, "org/tiny")
    try:
        server.wait_ready()
    finally:
        server.process.kill()
        server.wait_exit()
    assert [one.range for one in hub.asked if "/stored/" in one.path] == [f"bytes={kept_bytes}-"]


def wait_for(happened: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.05)
