"""`.ci/run` with a `make` that only says what the real one would."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

FAMILIES = "made families PYTEST_ARGS=--session-timeout=900"
SLOW = "made test-slow PYTEST_ARGS=--session-timeout=1800"
CLIENTS = "made clients PYTEST_ARGS=--session-timeout=720"
STUDY = "made study-quick PYTEST_ARGS=--session-timeout=1200"
REPO = Path(__file__).parents[1]
FAKE_MAKE = """#!/usr/bin/env bash
echo "made $*"
echo "==== 3 passed, 1 skipped in 0.0${{#1}}s ===="
[[ "$1" != {failing} ]]
"""


def run_ci(folder: Path, *, failing: str = "none", budget_s: int = 4800) -> tuple[int, list[str]]:
    """Its exit status and the lines that it printed."""
    make = folder / "make"
    make.write_text(FAKE_MAKE.format(failing=failing))
    make.chmod(make.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "MOESTRO_CI_BUDGET_S": str(budget_s),
    }
    done = subprocess.run(
        ["bash", str(REPO / ".ci" / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_all_targets_run_and_pytests_summary_is_last(tmp_path: Path) -> None:
    status, lines = run_ci(tmp_path)
    assert status == 0
    assert lines[0] == "made test"
    assert [line for line in lines if line in (FAMILIES, SLOW, CLIENTS, STUDY)] == [
        FAMILIES,
        SLOW,
        CLIENTS,
        STUDY,
    ]
    for target in ("families", "test-slow", "clients", "study-quick"):
        assert any(line.startswith(f"ci: {target}: passed in ") for line in lines)
    assert lines[-1] == "==== 3 passed, 1 skipped in 0.011s ====", "the last target's"


def test_what_the_time_does_not_reach_is_named_and_fails_nothing(tmp_path: Path) -> None:
    status, lines = run_ci(tmp_path, budget_s=60)
    assert status == 0
    assert SLOW not in lines
    assert any(line.startswith("ci: test-slow: not run, ") for line in lines)
    assert lines[-1] == "==== 3 passed, 1 skipped in 0.04s ===="


@pytest.mark.parametrize("failing", ["test", "families", "test-slow", "clients", "study-quick"])
def test_what_fails_fails_by_name(failing: str, tmp_path: Path) -> None:
    status, lines = run_ci(tmp_path, failing=failing)
    assert status == 1
    assert any(line.startswith(f"ci: {failing}: failed after ") for line in lines)
    assert (SLOW in lines) == (failing != "test")
    assert " passed" in lines[-1]
