"""Bytes that a token reads, counted by hand on a tiny model; and that a start says them."""

import logging
from pathlib import Path

import pytest
import torch

import tiny
from engine_kit import opened
from moestro.engine import EngineConfig
from moestro.engine.forecasts.gains import Gains
from moestro.engine.forecasts.token_reads import gains_of
from moestro.engine.planning.blueprint import inspect

LAYERS, CHOSEN, PAGE = 4, 2, 4096
ATTENTION = ((64, 64), (64, 64), (32, 64), (32, 64))  # q, o, k, v
HEAD = (260, 64)
SMALL = LAYERS * (64 + 32 + 2 * 64 + 8 * 64) + 64  # numbers of norms and routers: always fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("olmoe", tmp_path_factory.mktemp("reads") / "model")


def gains(folder: Path, experts: str = "native", dense: str = "native") -> Gains | None:
    config = EngineConfig(folder, folder, expert_format=experts, dense_format=dense)
    return gains_of(config, inspect(config))


def tiled(shape: tuple[int, int], row_bytes: int) -> int:
    """Whole tiles of 16 rows."""
    return -(-shape[0] // 16) * 16 * row_bytes


def experts_bytes(row_bytes: int) -> int:
    """Of 192 rows of 64 numbers each, in whole pages."""
    return LAYERS * CHOSEN * -(-192 * row_bytes // PAGE) * PAGE


def dense_bytes(row_bytes: int) -> int:
    matrices = LAYERS * sum(tiled(shape, row_bytes) for shape in ATTENTION)
    return matrices + tiled(HEAD, row_bytes) + 4 * SMALL


FP32, INT8, INT4 = 4 * 64, 64 + 4, 32 + 4  # bytes of a row: with its scale, int4 with its zero


def test_bytes_are_those_of_the_model_s_own_shapes(folder: Path) -> None:
    found = gains(folder)
    assert found is not None
    assert found.now.token_bytes == experts_bytes(FP32) + dense_bytes(FP32)
    assert {one.formats: one.token_bytes for one in found.smaller} == {
        ("int8", "int8"): experts_bytes(INT8) + dense_bytes(INT8),
        ("int4", "int8"): experts_bytes(INT4) + dense_bytes(INT8),
    }


def test_each_part_counts_in_its_own_format(folder: Path) -> None:
    found = gains(folder, experts="int8")
    assert found is not None
    assert found.now.token_bytes == experts_bytes(INT8) + dense_bytes(FP32)
    found = gains(folder, dense="int8")
    assert found is not None
    assert found.now.token_bytes == experts_bytes(FP32) + dense_bytes(INT8)
    assert gains(folder, "int8", "int8") is None


@pytest.mark.parametrize("family", ["granitemoeshared", "gpt_oss"])
def test_smaller_formats_read_less_whatever_the_family(family: str, tmp_path: Path) -> None:
    found = gains(tiny.build(family, tmp_path / "model", torch.bfloat16))
    assert found is not None
    assert len(found.smaller) == 2
    assert found.smaller[1].token_bytes < found.smaller[0].token_bytes < found.now.token_bytes


def test_where_torch_computes_nothing_is_promised(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moestro.engine.formats.named.library", lambda: None)
    assert gains(folder) is None


def test_the_start_says_it_in_one_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = gains(folder)
    assert found is not None
    caplog.set_level(logging.INFO)
    with opened(folder, tmp_path):
        pass
    assert [one.message for one in caplog.records if "formats: " in one.message] == [found.line()]
