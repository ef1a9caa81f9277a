"""What a stranger gets: the wheel, installed elsewhere and run from another folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOMS = ("server", "engine", "cache", "factorize")
BUILD_INPUTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
SOURCES = "engine/kernels/src"
LIBRARY = "engine/kernels/_native.so"
WHAT_TO_INSTALL = "apt-get install gcc libc6-dev"
BUILD = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
"""Without isolation: the development environment has setuptools, and no network is needed."""


@dataclass(frozen=True)
class Built:
    path: Path
    said: str  # by the build


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    # An empty PYTHONPATH and a safe path: nothing of the repository is found by accident.
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1", **variables}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command[0]} exited {done.returncode}\n{done.stdout}"
    return done.stdout


def copy_sources(into: Path) -> Path:
    """What is built anywhere else than here: what is left in the repository would leak into it."""
    for name in BUILD_INPUTS:
        shutil.copy2(REPO / name, into / name)
    for room in (*ROOMS, "tests", "deploy"):
        shutil.copytree(
            REPO / room, into / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
        )
    return into


def build(kind: str, source: Path, out: Path, **variables: str) -> Built:
    said = run(*BUILD, f"--{kind}", "--outdir", out, source, cwd=out, **variables)
    (built,) = (path for path in out.iterdir() if path.suffix in (".whl", ".gz"))
    return Built(built, said)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def bare_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Of a machine without a compiler: that takes a second, and compiling twenty."""
    return build("wheel", source, tmp_path_factory.mktemp("wheel"), CC="/bin/false")


@pytest.fixture(scope="module")
def wheel(bare_wheel: Built) -> Path:
    return bare_wheel.path


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"), CC="/bin/false").path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("venv"))


def installed(what: Path, venv: Path, *options: str, **variables: str) -> Path:
    """An interpreter that has it, and the third parties of the development environment."""
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    # addsitedir would run the editable install's own .pth; a plain path line adds the folder only.
    Path(site.strip(), "third_parties.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--force-reinstall"),
        *options,
        what,
        cwd=venv,
        **variables,
    )
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
        if path.is_file() and path.suffix in (".py", ".typed", ".safetensors", ".json")
    }
    assert wanted <= held, f"not packed: {sorted(wanted - held)}"
    assert {f"moestro/{room}/py.typed" for room in ROOMS} <= held


def test_no_c_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".c", ".h"))]


def test_the_sdist_holds_what_the_library_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"{SOURCES}/{path.name}" for path in (REPO / SOURCES).iterdir()}
    assert len(wanted) > 10
    assert wanted | {"setup.py"} <= held, f"not packed: {sorted(wanted - held)}"


def test_without_a_compiler_the_build_goes_on_and_says_so(bare_wheel: Built) -> None:
    assert WHAT_TO_INSTALL in bare_wheel.said
    assert f"moestro/{LIBRARY}" not in zipfile.ZipFile(bare_wheel.path).namelist()


def test_the_wheel_is_for_any_python_of_its_platform(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"moestro-0.1.0-py3-none-{platform}.whl"


# A compiler: writes an empty file for each object, and fails on one.
FAILS_ON_ONE = """#!/bin/sh
case "$*" in *isa_avx512.c*) echo "no such instruction" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def test_where_one_file_cannot_be_compiled_no_older_library_stays(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    compiler = tmp_path / "cc"
    compiler.write_text(FAILS_ON_ONE)
    compiler.chmod(0o755)
    (tmp_path / LIBRARY).write_bytes(b"of other sources")
    said = run(
        *(sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
        cwd=tmp_path,
        CC=str(compiler),
        PYTHONSAFEPATH="",
    )
    assert "isa_avx512.c" in said
    assert WHAT_TO_INSTALL in said
    assert not (tmp_path / LIBRARY).exists()


@pytest.mark.slow
def test_a_wheel_out_of_the_sdist_has_a_library_that_computes(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # not in every 3.11
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path)
    out, venv = tmp_path / "out", tmp_path / "venv"
    out.mkdir()
    venv.mkdir()
    built = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), out)
    assert f"moestro/{LIBRARY}" in zipfile.ZipFile(built.path).namelist()
    assert WHAT_TO_INSTALL not in built.said
    asked = "from moestro.engine.kernels import chosen, library; print(library(), chosen())"
    said = run(installed(built.path, venv), "-c", asked, cwd=tmp_path)
    assert str(venv) in said
    assert said.split()[-1] not in ("", "None")


@pytest.mark.parametrize("compiler", ["/bin/false", pytest.param("cc", marks=pytest.mark.slow)])
def test_an_editable_install_builds_in_place(compiler: str, tmp_path: Path) -> None:
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    venv.mkdir()
    copy_sources(source)
    python = installed(source, venv, "--no-build-isolation", "--editable", CC=compiler)
    found = [path.name for path in (source / LIBRARY).parent.glob("_native*")]
    assert found == ([] if compiler == "/bin/false" else ["_native.so"])
    assert "0.1.0" in run(python.parent / "moestro", "--version", cwd=tmp_path)


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
