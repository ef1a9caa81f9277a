"""The clients that most programs are written with."""

import pytest

from client_environments import Run
from server_process import ServerProcess


@pytest.mark.parametrize("environment", ["ours", "openai2"])
def test_openai(environment: str, server: ServerProcess, run_program: Run) -> None:
    assert "all served" in run_program(environment, "official.py", server.url)


def test_litellm(server: ServerProcess, run_program: Run) -> None:
    assert "all served" in run_program("litellm", "with_litellm.py", server.url)


def test_langchain(server: ServerProcess, run_program: Run) -> None:
    assert "all served" in run_program("langchain", "with_langchain.py", server.url)
