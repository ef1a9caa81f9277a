"""As `docker run --user 12345`: an id without a name, and a home that cannot be written."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny

USER = 12345
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
    ),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of that user; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        if subprocess.run([*AS_USER, "-c", ""], cwd="/", capture_output=True).returncode:
            pytest.skip("this interpreter lies where other users may not look")
        yield Path(name)


def test_a_user_without_name_and_home_runs_a_model(folder: Path) -> None:
    model, prompts = tiny.build("mixtral", folder / "model"), folder / "prompts.txt"
    prompts.write_text("some words\n", "utf-8")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    done = subprocess.run(
        [
            *(*AS_USER, "-m", "moestro.server", "trace", "record", model, folder / "trace"),
            *("--prompts", prompts, "--tokens", "2", "--cache-dir", folder / "cache"),
        ],
        env={**os.environ, "HOME": "/proc/1/nowhere"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "trace").stat().st_uid == USER
    assert "Traceback" not in done.stderr
