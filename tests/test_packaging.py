"""What a stranger gets: the wheel, installed elsewhere and run from another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOMS = ("server", "engine", "cache", "factorize")
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    # An empty PYTHONPATH and a safe path: nothing of the repository is found by accident.
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command[0]} exited {done.returncode}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a `build/` left in the repository would leak old modules into it."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILD_INPUTS:
        shutil.copy2(REPO / name, source / name)
    for room in (*ROOMS, "tests", "deploy"):
        shutil.copytree(
            REPO / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: the development environment has setuptools, and no network is needed.
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
        *("--skip-dependency-check", "--outdir", out, source),
        cwd=out,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and the third parties of the development environment."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", wheel),
        cwd=venv,
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    # addsitedir would run the editable install's own .pth; a plain path line adds the folder only.
    Path(site.strip(), "third_parties.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_the_four_rooms_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {tuple(name.split("/")[:2]) for name in names} == {("moestro", room) for room in ROOMS}


def test_every_source_and_data_file_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"moestro/{path.relative_to(REPO)}"
        for room in ROOMS
        for path in (REPO / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted <= held, f"not packed: {sorted(wanted - held)}"
    assert {f"moestro/{room}/py.typed" for room in ROOMS} <= held


def test_the_command_runs_from_another_folder(python: Path, tmp_path: Path) -> None:
    version = run(python.parent / "moestro", "--version", cwd=tmp_path)
    assert "0.1.0" in version
    for command in ([python.parent / "moestro"], [python, "-m", "moestro.server"]):
        assert "serve" in run(*command, "--help", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == [], "looking at help writes nothing"


def test_the_installed_rooms_are_the_wheels_own(python: Path, tmp_path: Path) -> None:
    # The development environment's editable install must not answer in the wheel's place.
    where = run(
        *(python, "-c", "import moestro.engine, moestro.factorize; print(moestro.engine.__file__)"),
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(python.parents[1])


@pytest.mark.parametrize("name", [*ROOMS, "tests", "deploy"])
def test_bare_names_are_nobodys(python: Path, tmp_path: Path, name: str) -> None:
    look = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert run(python, "-c", look, cwd=tmp_path).strip() == "None"
