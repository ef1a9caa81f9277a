"""`make gpu-check` where no GPU is: says so and runs nothing; its measurements run on a fake."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from imagined import imagined

REPO = Path(__file__).parents[1]


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "tests" / "bench")
    return importlib.import_module("gpu_report")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_a_gpu_nothing_is_run_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, str(REPO / "tests/bench/gpu_report.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 3
    assert "no CUDA device: nothing was run" in done.stdout
    assert not path.exists()


def test_the_engine_is_measured_at_every_share(
    gpu_report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpu_report.olmoe(tmp_path / "model", layers=2, experts=8, hidden=64, inner=32)
    monkeypatch.setattr(gpu_report, "FORMATS", ("native",))
    monkeypatch.setattr(gpu_report, "DECODE_TOKENS", 4)
    found = {"bytes_per_s": {"pinned": {"1 MiB": 1e9}}}
    rows = gpu_report.engine(
        model, tmp_path / "cache", found, device="auto", choose_device=imagined()
    )
    assert [row["slots"] for row in rows] == [16, 8, 8]
    assert rows[0]["decode_moved_bytes"] == 0 < rows[1]["decode_moved_bytes"]
    assert rows[0]["decode_hit_percent"] == 100 > rows[1]["decode_hit_percent"]
    for row in rows:
        assert row["decode_tokens_per_s"] > 0
        assert row["decode_stall_s"] >= 0


def test_the_link_is_measured_by_size(
    gpu_report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "SIZES_BYTES", (1 << 20, 2 << 20))
    found = gpu_report.link(torch.device("cpu"), lambda: None)
    for rates in found["bytes_per_s"].values():
        assert list(rates) == ["1 MiB", "2 MiB"]
        assert all(rate > 0 for rate in rates.values())
