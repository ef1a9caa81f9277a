"""A GGUF file served by a real process: its name, an answer, and memory seen from outside."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from gguf import GGMLQuantizationType as Kind

import gguf_models
from engine_kit import MIB, opened
from exposition import samples
from moestro.engine import EngineConfig, plan_model
from server_process import serving

LAYERS, EXPERTS, HIDDEN, INNER = 12, 32, 512, 256
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INNER * 4  # float32: 48 MiB of 576
BUDGET_BYTES = 48 * MIB


@pytest.mark.slow
def test_a_plan_is_the_starts_own(tmp_path: Path) -> None:
    path = gguf_models.write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0, parts=2)
    settings: dict[str, Any] = {"kv_memory_bytes": 4 * MIB, "threads": 1}
    cache = tmp_path / "cache"
    forecast = plan_model(EngineConfig(path, cache, **settings), disk_bytes_per_s=1e9)
    assert forecast.has_weights and forecast.stored_dtype == "float32"
    with opened(path, cache, **settings) as loaded:
        started = loaded.plan.parts()
    assert {**forecast.plan.parts(), "interpreter": 0} == {**started, "interpreter": 0}


@pytest.mark.slow
def test_packing_stays_inside_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense part, one layer and the budget above the interpreter, at the first start."""
    monkeypatch.setattr(gguf_models, "LAYERS", LAYERS)
    monkeypatch.setattr(gguf_models, "EXPERTS", EXPERTS)
    (tmp_path / "model").mkdir()
    first = gguf_models.write_gguf(
        tmp_path / "model" / "Tiny-Q4_K_M.gguf",
        kind=Kind.Q4_K,
        hidden=HIDDEN,
        inner=INNER,
        parts=3,
        others={"context_length": 128},
    )
    budget = ("--host-memory", str(BUDGET_BYTES), "--kv-memory", "2MiB", "--threads", "1")
    with serving(first.parent, *budget, "--cache-dir", str(tmp_path / "cache")) as server:
        name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        assert server.complete([5, 6, 7], max_tokens=4).status_code == 200
        planned = {
            dict(labels)["part"]: value
            for (metric, labels), value in samples(server.metrics()).items()
            if metric == "moestro_memory_planned_bytes"
        }
        status = Path(f"/proc/{server.process.pid}/status").read_text("utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    peak = max(1024 * int(line.split()[1]), server.peak_rss_bytes)
    assert name == "model"
    assert sum(planned.values()) < planned["interpreter"] + LAYERS * LAYER_BYTES / 2
    assert peak <= 1.05 * sum(planned.values())
    rest = planned["dense"] + planned["experts"] + planned["kv"]
    # one layer, and less than half of one for what encodes it
    assert peak - planned["interpreter"] <= rest + 1.5 * LAYER_BYTES
