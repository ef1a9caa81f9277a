"""Which products compute, as a start and a plan say it; and by how many threads."""

import logging
import sys
from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import MIB, logits_of, opened
from moestro.engine import EngineConfig, StartError, plan_model
from moestro.engine.kernels import NEVER, GemmChoice, gemm_line, int_mm_is_exact, library
from moestro.engine.kernels.library import MISSING, chosen, instruction_sets, load

HOME = sys.modules["moestro.engine.kernels.library"]  # its door has a function of that name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("products") / "model")


def started(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of the lines about products."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    with opened(folder, cache):
        pass
    return [
        (one.levelname, one.message)
        for one in caplog.records
        if "the products of" in one.message or one.message.startswith("products")
    ]


def test_the_start_names_the_instruction_set(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen() in instruction_sets()
    assert started(folder, tmp_path, caplog) == [("INFO", f"products: {chosen()}")]


@pytest.mark.skipif(not int_mm_is_exact(), reason="torch saturates on this processor")
@pytest.mark.parametrize(
    "choice", [GemmChoice(16, 16, 1e9, 2e9), GemmChoice(NEVER, 1024, 2e9, 1e9)]
)
def test_the_start_says_who_multiplies_many_rows(
    choice: GemmChoice,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, asked, int_mm = list(range(3, 63)), list[int](), torch._int_mm

    def counted(rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return int_mm(rows, weights, out=out)

    own = logits_of(folder, tmp_path, prompt, expert_format="int8")
    monkeypatch.setattr(torch, "_int_mm", counted)
    monkeypatch.setattr("moestro.engine.found.kept_gemm", lambda *_: choice)
    caplog.set_level(logging.INFO)
    assert torch.equal(logits_of(folder, tmp_path, prompt, expert_format="int8"), own)
    assert f"products: {gemm_line(choice)}" in caplog.messages
    assert bool(asked) == (choice.least_rows != NEVER) and all(rows >= 16 for rows in asked)


def test_the_start_warns_where_there_is_no_library(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moestro.engine.formats.named.library", lambda: None)
    monkeypatch.setattr(HOME, "library", lambda: None)
    assert started(folder, tmp_path, caplog) == [("WARNING", MISSING)]


def test_a_plan_says_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(folder, tmp_path, kv_memory_bytes=4 * MIB, threads=1)
    assert plan_model(config, 1e9).compute.products == chosen()
    monkeypatch.setattr("moestro.engine.formats.named.library", lambda: None)
    monkeypatch.setattr(HOME, "library", lambda: None)
    assert plan_model(config, 1e9).compute.products == "torch"


def test_the_pool_has_the_threads_of_the_flag(folder: Path, tmp_path: Path) -> None:
    found = library()
    assert found is not None
    found.moestro_pool_set_threads(3)
    with opened(folder, tmp_path, threads=1):
        assert found.moestro_pool_threads() == 1
    found.moestro_pool_set_threads(3)
    config = EngineConfig(folder, tmp_path, kv_memory_bytes=4 * MIB, threads=1)
    plan_model(config, 1e9)
    assert found.moestro_pool_threads() == 1


def test_a_build_without_a_library_has_none_at_its_place(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"_native\.so does not load .*install moestro again"):
        load(tmp_path / "_native.so")
