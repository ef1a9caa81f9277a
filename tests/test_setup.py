"""scripts/setup.sh and `make clean`, in a copy, with an interpreter that installs nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LIBRARY = "engine/kernels/_native.so"

# Of .venv: its pip does nothing, or leaves a library. It was built by the compiler `a-cc -pthread`.
PYTHON = """#!/bin/sh
case "$*" in
    *"pip install"*) echo installed >> log; [ ! -f builds ] || : > {library};;
    *get_config_var*) echo "a-cc -pthread";;
    --version) echo "Python 3.11.0";;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "setup.py", "Makefile"):
        shutil.copy2(REPO / name, tmp_path / name)
    shutil.copytree(REPO / "engine/kernels/src", tmp_path / "engine/kernels/src")
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    put(tmp_path / ".venv/bin/python", PYTHON.format(library=LIBRARY))
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(folder: Path, target: str) -> str:
    """What it says on either stream."""
    environment = {name: each for name, each in os.environ.items() if name not in ("CC", "PYTHON")}
    environment["PATH"] = f"{folder / 'tools'}:{environment['PATH']}"
    done = subprocess.run(
        ("make", "--no-print-directory", target),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_missing_compiler_is_named_in_one_line(folder: Path) -> None:
    (line,) = (line for line in make(folder, "setup").splitlines() if "torch's products" in line)
    assert "no C compiler (a-cc)" in line
    assert "apt-get install gcc libc6-dev" in line


def test_a_compiler_that_fails_is_told_from_none(folder: Path) -> None:
    put(folder / "tools/a-cc", "#!/bin/sh\n")
    assert "the C compiler (a-cc) failed" in make(folder, "setup")


def test_nothing_is_said_where_the_library_was_built(folder: Path) -> None:
    put(folder / "builds", "")
    assert "torch's products" not in make(folder, "setup")


def test_a_compiler_that_came_later_is_used(folder: Path) -> None:
    for _ in range(2):  # once is enough
        make(folder, "setup")
    assert (folder / "log").read_text().split() == ["installed"]
    put(folder / "tools/a-cc", "#!/bin/sh\necho a-cc 12\n")
    put(folder / "builds", "")
    assert "torch's products" not in make(folder, "setup")
    assert (folder / "log").read_text().split() == ["installed"] * 2


def test_clean_removes_what_was_built(folder: Path) -> None:
    before = {path for path in folder.rglob("*") if ".venv" not in path.parts}
    for name in (LIBRARY, "engine/kernels/_native.cpython-311.so", "build/lib/_native.so"):
        put(folder / name, "")
    make(folder, "clean")
    assert set(folder.rglob("*")) == before
