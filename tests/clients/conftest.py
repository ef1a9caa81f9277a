"""Real clients on loopback, each in an environment of its own, against the demo model."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client_environments import HERE, INSTALL_S, RUN_S, Run, environment, run_command
from moestro.factorize import prepare_demo
from server_process import ServerProcess, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)
            item.add_marker(pytest.mark.timeout(INSTALL_S + RUN_S))


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    return Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))


@pytest.fixture(scope="session")
def demo(cache_dir: Path) -> Path:
    return prepare_demo(cache_dir, lambda _: None)


@pytest.fixture(scope="session")
def server(demo: Path, cache_dir: Path) -> Iterator[ServerProcess]:
    flags = ("--cache-dir", str(cache_dir), "--expert-format", "native", "--host-memory", "200MiB")
    with serving("demo", *flags) as running:
        yield running


@pytest.fixture(scope="session")
def run_program() -> Run:
    """`run_program("openai2", "official.py", url)`: what it printed. Its failure is the test's."""

    def run(name: str, program: str, *arguments: str) -> str:
        python = sys.executable if name == "ours" else str(environment(name))
        return run_command([python, str(HERE / "programs" / program), *arguments])

    return run
