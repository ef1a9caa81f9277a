"""Peers: what they print, how they are started, where their files lie."""

import sys
from pathlib import Path

import pytest
from full.geometry import TINY
from full.llama_cpp import parse_bench, parse_timings
from full.memgroup import NoMemoryGroup, forget_pages, memory_group
from full.places import NoRoom, needed_bytes, workshop
from full.processes import TurnFailed, last_json, run

BENCH = """load_backend: loaded CPU backend
{"model_type": "olmoe", "n_prompt": 512, "n_gen": 0, "avg_ts": 9.0, "samples_ts": [8.4, 9.6, 9.0]}
{"model_type": "olmoe", "n_prompt": 0, "n_gen": 32, "avg_ts": 5.1, "samples_ts": [5.3, 5.0]}
"""
TIMINGS = """
common_perf_print:    sampling time =      12.00 ms
common_perf_print: prompt eval time =   16000.00 ms /   256 tokens (   62.5 ms per token)
common_perf_print:        eval time =    8000.00 ms /    32 runs   (  250.0 ms per token)
"""


def test_llama_bench_gives_medians() -> None:
    speeds = parse_bench(BENCH)
    assert speeds.prefill == 9.0
    assert speeds.decode == pytest.approx(5.15)


def test_llama_bench_without_a_result_is_an_error() -> None:
    with pytest.raises(TurnFailed, match="no result"):
        parse_bench("error: unable to load model")


def test_timings_of_a_completion() -> None:
    speeds = parse_timings(TIMINGS)
    assert speeds.prefill == pytest.approx(16.0)
    assert speeds.decode == pytest.approx(4.0)
    with pytest.raises(TurnFailed, match="no timings"):
        parse_timings("killed")


def test_the_last_json_line_counts() -> None:
    assert last_json('{"a": 1}\nnoise\n{"a": 2}\n') == {"a": 2}
    with pytest.raises(TurnFailed, match="no JSON"):
        last_json("nothing")


def test_a_turn_runs_on_one_thread_and_is_seen_from_outside() -> None:
    code = "import os, time; x = bytearray(64 << 20); time.sleep(0.3)"
    code += "; print(os.environ['OMP_NUM_THREADS'])"
    outcome = run([sys.executable, "-c", code])
    assert outcome.stdout.split()[0] == "1"
    assert outcome.peak_rss_bytes > 64 << 20


def test_a_turn_that_fails_says_how() -> None:
    with pytest.raises(TurnFailed, match="what was wrong"):
        run([sys.executable, "-c", "raise SystemExit('what was wrong')"])


def test_a_folder_without_controllers_is_no_memory_group(tmp_path: Path) -> None:
    with pytest.raises(NoMemoryGroup, match="memory"), memory_group(1 << 30, tmp_path):
        pass


def test_a_memory_group_is_made_and_removed(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory")
    (tmp_path / "memory").mkdir()
    limits: list[str] = []
    with memory_group(12345, tmp_path) as group:
        limits.append((group / "memory.limit_in_bytes").read_text())
        (group / "memory.limit_in_bytes").unlink()  # a real one is no file of its folder
    assert limits == ["12345"] and not group.exists()


def test_forgetting_pages_changes_no_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"x" * 10_000)
    forget_pages(tmp_path)
    assert (tmp_path / "data").read_bytes() == b"x" * 10_000


def test_a_workshop_removes_what_it_made_and_leaves_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    with pytest.raises(KeyboardInterrupt), workshop(tmp_path, 0) as shop:
        shop.path("found")
        (shop.path("made") / "deep").mkdir(parents=True)
        shop.path("file.gguf").write_text("large")
        shop.path("half.gguf").with_suffix(".part").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_what_is_dropped_and_made_again_is_removed_at_the_end(tmp_path: Path) -> None:
    with workshop(tmp_path / "shop", 0) as shop:
        path = shop.path("model.gguf")
        path.write_text("first")
        shop.drop(path)
        assert not path.exists()
        path.write_text("again")
        assert shop.path("model.gguf") in shop.made("*.gguf")
    assert not (tmp_path / "shop").exists()


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    place = tmp_path / "models"
    with pytest.raises(NoRoom, match="MOESTRO_BENCH_DIR"), workshop(place, 1 << 60):
        pass
    assert not place.exists()
    assert needed_bytes(TINY) > TINY.checkpoint_bytes
