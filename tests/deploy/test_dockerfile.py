"""The image's recipe, read as text: no container engine is needed to keep its promises."""

import ast
import json
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import parse_serve

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Step:
    word: str
    rest: str


def read_steps(text: str) -> list[Step]:
    """The instructions, comments dropped and continued lines joined."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return read_steps((REPO / "Dockerfile").read_text("utf-8"))


Stages = dict[str, list[Step]]


@pytest.fixture(scope="module")
def stages(steps: list[Step]) -> Stages:
    """By name, each with the steps of the stage that it goes on from."""
    found: Stages = {}
    for step in steps:
        if step.word == "FROM":
            base, _, name = step.rest.split()
            current = found[name] = list(found.get(base, []))
        elif found:
            current.append(step)
    return found


@pytest.fixture(scope="module")
def build_stage(stages: Stages) -> list[Step]:
    return stages["build"]


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def last_stage(stages: Stages, request: pytest.FixtureRequest) -> list[Step]:
    return stages[str(request.param)]


def one(stage: list[Step], word: str) -> str:
    (found,) = (step.rest for step in stage if step.word == word)
    return found


def environment(stage: list[Step]) -> dict[str, str]:
    pairs = (pair for step in stage if step.word == "ENV" for pair in step.rest.split())
    return dict(pair.split("=", 1) for pair in pairs)


def test_the_base_image_is_an_argument_with_a_tag(steps: list[Step]) -> None:
    assert steps[0].word == "ARG"
    assert re.fullmatch(r"BASE_IMAGE=[\w./-]+:[\w.-]+", steps[0].rest)
    bases = [step.rest.split()[0] for step in steps if step.word == "FROM"]
    assert bases == ["${BASE_IMAGE}", "build", "${BASE_IMAGE}", "runtime", "runtime"]


def test_the_image_that_is_built_unless_another_is_named_uses_a_gpu(
    steps: list[Step], stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [step.rest for step in steps if step.word == "FROM"][-1].endswith(" AS cuda")
    variables = environment(stages["cuda"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    for image, chosen in (("cuda", ("auto", "auto")), ("cpu", ("cpu", "native"))):
        for name, value in environment(stages[image]).items():
            if name.startswith("MOESTRO_"):
                monkeypatch.setenv(name, value)
        settings = parse_serve(["serve", "demo"])
        assert (settings.device, settings.expert_format) == chosen
        for name in ("MOESTRO_DEVICE", "MOESTRO_EXPERT_FORMAT"):
            monkeypatch.delenv(name, raising=False)


def test_its_torch_must_know_cuda_and_bitsandbytes_comes_along(stages: Stages) -> None:
    check, install = (run for run in run_steps(stages["build-cuda"])[-2:])
    program = shlex.split(check)[-1]
    ast.parse(program)
    assert "torch.version.cuda" in program
    program = shlex.split(install.partition(" > ")[0])[-1]
    ast.parse(program)
    assert '["nf4"]' in program and "--requirement" in install


def test_no_index_is_named(steps: list[Step]) -> None:
    assert not [step for step in steps if "://" in step.rest and "127.0.0.1" not in step.rest]


def test_it_runs_as_a_numbered_user_that_owns_only_the_data(last_stage: list[Step]) -> None:
    user, group = one(last_stage, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    volume = one(last_stage, "VOLUME")
    assert one(last_stage, "WORKDIR") == volume
    assert f"install -d -o {user} -g {group} -m 0755 {volume}" in one(last_stage, "RUN")
    words = [step.word for step in last_stage]
    assert words.index("USER") > words.index("RUN")
    assert words.index("USER") > words.index("COPY")
    assert words[-1] == "USER"


def test_python_in_the_image(last_stage: list[Step]) -> None:
    variables = environment(last_stage)
    assert variables["PYTHONSAFEPATH"] == "1"
    assert variables["PYTHONUNBUFFERED"] == "1"
    assert variables["HOME"] == one(last_stage, "VOLUME")


def test_the_health_check_is_python_that_parses(last_stage: list[Step]) -> None:
    _, _, command = one(last_stage, "HEALTHCHECK").partition("CMD ")
    python, flag, program = json.loads(command)
    assert (python, flag) == ("python3", "-c")
    ast.parse(program)
    assert "/health" in program


def test_what_is_copied_exists_and_is_sent(steps: list[Step]) -> None:
    copied = {
        source
        for step in steps
        if step.word == "COPY" and "--from" not in step.rest
        for source in step.rest.split()[:-1]
    }
    assert copied == {"pyproject.toml", "setup.py", "README.md", "LICENSE"} | {
        "server",
        "engine",
        "cache",
        "factorize",
    }
    assert all((REPO / source).exists() for source in copied)
    lines = (REPO / ".dockerignore").read_text("utf-8").splitlines()
    assert lines[lines.index("*") :][0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied


def run_steps(stage: list[Step]) -> list[str]:
    return [step.rest for step in stage if step.word == "RUN"]


def run_shell(command: str, tools: Path) -> str:
    """In a shell that finds `tools` alone."""
    done = subprocess.run(
        ("/bin/sh", "-c", command),
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def tool(folder: Path, name: str, exit_code: int = 0) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*"\nexit {exit_code}\n')
    path.chmod(0o755)


def test_the_compiler_is_in_the_build_stage_alone(
    build_stage: list[Step], last_stage: list[Step]
) -> None:
    (command,) = (run for run in run_steps(build_stage) if "apt-get" in run)
    assert "gcc libc6-dev" in command
    assert not [run for run in run_steps(last_stage) if "apt-get" in run or "gcc" in run]
    (copied,) = (step.rest for step in last_stage if step.word == "COPY")
    assert re.fullmatch(r"--from=build(-cuda)? /opt/moestro /opt/moestro", copied)


def test_a_base_that_has_a_compiler_gets_none(build_stage: list[Step], tmp_path: Path) -> None:
    (command,) = (run for run in run_steps(build_stage) if "apt-get" in run)
    for name in ("apt-get", "rm"):
        tool(tmp_path, name)
    update, install, remove = run_shell(command, tmp_path).splitlines()
    assert update == "apt-get update"
    assert install == "apt-get install --yes --no-install-recommends gcc libc6-dev"
    assert remove.startswith("rm -rf /var/lib/apt/lists/")
    tool(tmp_path, "gcc")
    assert "apt-get" not in run_shell(command, tmp_path)
    (tmp_path / "gcc").unlink()
    tool(tmp_path, "apt-get", exit_code=1)
    with pytest.raises(subprocess.CalledProcessError):
        run_shell(command, tmp_path)


def test_an_image_without_the_library_is_not_built(build_stage: list[Step]) -> None:
    words = [step.word for step in build_stage]
    install = run_steps(build_stage)[-1]
    assert words[-1] == "RUN"
    assert "CC=gcc /opt/moestro/bin/pip install --no-deps ." in install
    program = shlex.split(install)[-1]
    ast.parse(program)
    assert "library()" in program


def test_no_library_of_this_machine_is_sent() -> None:
    assert "**/*.so" in (REPO / ".dockerignore").read_text("utf-8").splitlines()


def test_signals_reach_the_server(last_stage: list[Step]) -> None:
    # The exec form: a shell in between would swallow SIGTERM.
    assert json.loads(one(last_stage, "ENTRYPOINT")) == ["moestro"]
    assert one(last_stage, "STOPSIGNAL") == "SIGTERM"
    assert one(last_stage, "EXPOSE") == "8000"


def test_the_command_is_one_that_the_command_line_takes(last_stage: list[Step]) -> None:
    settings = parse_serve(json.loads(one(last_stage, "CMD")))
    assert settings.is_demo
    assert settings.host == "0.0.0.0"
    assert str(settings.port) == one(last_stage, "EXPOSE")


def test_the_cache_is_in_the_volume(
    last_stage: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(last_stage).items():
        if name.startswith("MOESTRO_"):
            monkeypatch.setenv(name, value)
    settings = parse_serve(json.loads(one(last_stage, "CMD")))
    assert str(settings.cache_dir) == one(last_stage, "VOLUME")
