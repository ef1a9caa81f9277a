"""`moestro gpu-check` on an imagined device of tiny widths: its files, whatever happens to it."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.engine import EngineConfig, Geometry, Opener, ProgressFn, Sizes, load
from moestro.engine.loader import Loaded
from moestro.server.commands.cli import main
from moestro.server.facts import Refused
from moestro.server.gpu_check import run_gpu_check

TINY = Geometry("Tiny 1", "qwen3_moe", 64, 64, 8, 2, 4, 2, 16, 4)
SIZES = Sizes(
    limit_s=100.0,
    vocab_size=500,
    samples=2,
    most_layers=2,
    checked_formats=("native",),
    formats=("native",),
    shares=(1.0, 0.5),
    prompt_tokens=8,
    decode_tokens=4,
    profiled_tokens=2,
    geometries=(TINY,),
)
NAMES = [
    "environment",
    "pinned memory",
    "link",
    "copies side by side",
    "correctness, native",
    "sampling",
    "widths of Tiny 1",
]
NEED_A_GPU = {"pinned memory", "link", "copies side by side"}


def run(
    folder: Path, open_engine: Opener = load, sizes: Sizes = SIZES
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the object, the page."""
    out = folder / "report.json"
    code = run_gpu_check("cpu", False, out, folder / "cache", open_engine, sizes)
    return code, json.loads(out.read_text("utf-8")), out.with_suffix(".txt").read_text("utf-8")


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states: list[dict[str, str]] = []

    def watched(config: EngineConfig, progress: ProgressFn) -> Loaded:
        found = json.loads((tmp_path / "report.json").read_text("utf-8"))
        states.append({name: check["status"] for name, check in found["checks"].items()})
        return load(config, progress)

    code, found, text = run(tmp_path, watched)
    assert code == 0
    assert (found["status"], found["device"], found["imagined"]) == (
        "passed",
        "imagined: no GPU",
        True,
    )
    checks = found["checks"]
    assert list(checks) == NAMES
    for name, check in checks.items():
        wanted = ("not run", "no GPU") if name in NEED_A_GPU else ("passed", "")
        assert (check["status"], check["why"]) == wanted
        assert f"{name}: " in text
    # each check is in the file as soon as it is done
    assert [state["environment"] for state in states] == ["passed"] * len(states)
    assert states[0]["correctness, native"] == "running"
    assert (states[-1]["sampling"], states[-1]["widths of Tiny 1"]) == ("passed", "running")

    whole, half = checks["widths of Tiny 1"]["facts"]["rows"]
    assert (whole["slots"], half["slots"]) == (16, 8)
    assert whole["hit_share"] == 1 > half["hit_share"]
    assert whole["moved_bytes_per_token"] == 0 < half["moved_bytes_per_token"]
    assert whole["operations_per_layer"] > 10 and whole["launches_per_layer"] is None
    correct = checks["correctness, native"]["facts"]
    assert correct["all_resident"]["tokens"] == correct["half_resident"]["tokens"]
    assert (correct["all_resident"]["slots"], correct["half_resident"]["slots"]) == (16, 8)

    head = f"moestro {found['moestro']} gpu-check, imagined: no GPU: passed (4 passed, 3 not run)"
    assert text.startswith(head)
    assert "measured on imagined: no GPU" in text and "link: not run: no GPU" in text
    assert str(tmp_path) not in text + json.dumps(found)
    assert capsys.readouterr().out == text
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_planted_fault_leaves_the_other_checks(tmp_path: Path) -> None:
    def faulty(config: EngineConfig, progress: ProgressFn) -> Loaded:
        raise torch.OutOfMemoryError(f"planted in {config.cache_dir}/packs/x.pack")

    code, found, text = run(tmp_path, faulty)
    assert (code, found["status"]) == (1, "failed")
    status = {name: check["status"] for name, check in found["checks"].items()}
    assert status["environment"] == status["sampling"] == "passed"
    assert status["correctness, native"] == status["widths of Tiny 1"] == "failed"
    broken = found["checks"]["correctness, native"]
    assert broken["traceback"][0].startswith("Traceback")
    assert any("in faulty" in line for line in broken["traceback"])
    assert "OutOfMemoryError: planted in …/x.pack" in text
    assert str(tmp_path) not in text + json.dumps(found)
    assert found["checks"]["widths of Tiny 1"]["facts"]["model"].startswith("2 layers of 8 experts")


def test_other_tokens_than_stock_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that computes half as much again is found out, and one of NaN."""
    factors = iter([1.5, float("nan")])

    def wrong(config: EngineConfig, progress: ProgressFn) -> Loaded:
        loaded = load(config, progress)
        lane = loaded.engine.runner.lane
        right = lane.run
        factor = next(factors)
        monkeypatch.setattr(lane, "run", lambda *given: right(*given) * factor)
        return loaded

    code, found, text = run(tmp_path, wrong, replace(SIZES, geometries=()))
    assert (code, found["checks"]["correctness, native"]["status"]) == (1, "failed")
    assert "PROBLEM: all resident: logits differ by 5.0e-01" in text
    assert "PROBLEM: half resident: logits differ by nan" in text
    assert found["checks"]["correctness, native"]["facts"]["half_resident"]["median"] == "nan"


def test_ctrl_c_keeps_what_was_found_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: EngineConfig, progress: ProgressFn) -> Loaded:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted)
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    status = [check["status"] for check in found["checks"].values()]
    assert status == ["passed", *["not run"] * 3, "interrupted", "waiting", "waiting"]
    assert found["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "report.txt").read_text("utf-8").splitlines()[0]
    assert f"interrupted; what was found is in {tmp_path}/report.json" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_without_a_gpu_it_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moestro", "gpu-check", "--cache-dir", str(tmp_path / "c")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no GPU: torch" in said and "gpu-check --device cpu" in said
    assert not list(tmp_path.rglob("gpu-check*"))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    def second(config: EngineConfig, progress: ProgressFn) -> Loaded:
        with pytest.raises(Refused, match="another gpu-check uses"):
            run(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, second)


def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json.partial").mkdir()
    with pytest.raises(Refused, match="--out: cannot write .*Is a directory"):
        run(tmp_path)


def command(folder: Path, *arguments: str) -> list[str]:
    report = str(folder / "report.json")
    places = ("--cache-dir", str(folder / "cache"), "--out", report)
    name = (sys.executable, "-m", "moestro.server", "gpu-check", "--device", "cpu")
    return [*name, *places, *arguments]


@pytest.mark.slow
def test_real_widths_on_an_imagined_device(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, "--quick"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    rows = found["checks"]["widths of Qwen3-30B-A3B"]["facts"]["rows"]
    assert [row["share"] for row in rows] == [1.0, 0.5]
    assert rows[0]["hit_share"] == 1 > rows[1]["hit_share"]
    assert len(done.stdout.splitlines()) <= 70  # a page


@pytest.mark.slow
def test_a_signal_leaves_a_whole_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "correctness, native: running" in line:
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert "interrupted; what was found is in" in said
    found = json.loads(report.read_text("utf-8"))
    assert found["status"] == found["checks"]["correctness, native"]["status"] == "interrupted"
    assert found["checks"]["environment"]["status"] == "passed"
    assert list((tmp_path / "cache").iterdir()) == []
