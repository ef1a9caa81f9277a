"""One tiny dense Llama with its plan, made once for the room's tests."""

from pathlib import Path

import pytest
import torch

from moestro.engine import Progress
from moestro.factorize import Plan, SplitOptions, make_plan
from tiny_llama import write_text, write_tiny_llama

OPTIONS = SplitOptions(
    experts=4, shared_neurons=16, top_k=3, calibration_tokens=1024, window_tokens=64
)


def quiet(_: Progress) -> None:
    pass


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture
def long_dense(tmp_path: Path) -> Path:
    """A context of 512, the window that the commands use."""
    return write_tiny_llama(tmp_path / "dense", max_position_embeddings=512)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [write_text(folder / f"{i}.txt", seed=i) for i in range(2)]


@pytest.fixture(scope="session")
def plan(dense: Path, texts: list[Path]) -> Plan:
    return make_plan(dense, OPTIONS, texts, quiet, command="the command")
