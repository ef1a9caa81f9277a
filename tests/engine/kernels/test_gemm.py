"""Many rows of int8 by torch instead of by the library: the same bits, and the choice."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moestro.engine.kernels import (
    GEMM_NOTE,
    NEVER,
    GemmChoice,
    Scratch,
    TileFormat,
    encode,
    gemm_line,
    kept_gemm,
    linear,
    measure_gemm,
    tile_matrix,
    use_gemm,
)
from moestro.engine.kernels import gemm as home
from moestro.engine.kernels import gemm_note as note

SHAPES = ((48, 64), (37, 96), (5, 40), (1100, 260))


@pytest.fixture(autouse=True)
def _own_again() -> Iterator[None]:
    yield
    use_gemm(NEVER)


@pytest.mark.skipif(not home.int_mm_is_exact(), reason="torch saturates on this processor")
def test_torchs_product_gives_the_same_bits(instruction_set: str) -> None:
    torch.manual_seed(0)
    form, scratch = TileFormat("int8"), Scratch()
    for outputs, inputs in SHAPES:
        matrix = tile_matrix(encode(torch.randn(outputs, inputs), form), form, outputs, inputs)
        bias = torch.randn(outputs)
        for count in (15, 16, 40):
            rows = torch.randn(count, inputs)
            rows[3, 5] = -200.0
            use_gemm(NEVER)
            own = linear(rows, matrix, bias, scratch)
            use_gemm(16)
            assert torch.equal(linear(rows, matrix, bias, scratch), own), (outputs, inputs, count)


def test_it_is_asked_for_many_rows_of_whole_rows_scales_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, ...]] = []

    def multiply(*given: int) -> int:
        asked.append(given[3:])
        return 0

    monkeypatch.setattr(home, "_multiply", multiply)
    home._callback.cache_clear()
    use_gemm(16)
    rows, scratch = torch.randn(20, 64), Scratch()
    for name, group in (("int8", 0), ("int8", 32), ("int4", 0), ("float32", 0)):
        form = TileFormat(name, 32 if name == "int4" else 0)
        matrix = tile_matrix(encode(torch.randn(33, 64), form), form, 33, 64, group)
        for count in (15, 20):
            linear(rows[:count].contiguous(), matrix, None, scratch)
    home._callback.cache_clear()
    assert asked == [(20, 48, 64)]


def test_where_torch_fails_the_library_multiplies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    form = TileFormat("int8")
    matrix = tile_matrix(encode(torch.randn(48, 64), form), form, 48, 64)
    rows = torch.randn(20, 64)
    own = linear(rows, matrix, None, Scratch())

    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no such product")

    monkeypatch.setattr(torch, "_int_mm", fail)
    use_gemm(16)
    home._say_refused.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(linear(rows, matrix, None, Scratch()), own)
    assert caplog.text.count("no such product") == 1


RATES = {1024: (100.0, 150.0), 512: (100.0, 120.0), 256: (100.0, 105.0), 128: (1.0, 9.0)}


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        (RATES, GemmChoice(512, 512, 100.0, 120.0)),
        (RATES | {1024: (100.0, 109.0)}, GemmChoice(NEVER, 1024, 100.0, 109.0)),
        (
            dict.fromkeys((1024, 512, 256, 128, 64, 32, 16), (1.0, 9.0)),
            GemmChoice(16, 16, 1.0, 9.0),
        ),
    ],
)
def test_the_fewest_rows_with_which_it_is_worth_it_are_chosen(
    rates: dict[int, tuple[float, float]], wanted: GemmChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, "int_mm_is_exact", lambda: True)
    monkeypatch.setattr(
        home, "_tried", lambda _, __, count: GemmChoice(count, count, *rates[count])
    )
    assert measure_gemm() == wanted


def test_a_product_that_saturates_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "int_mm_is_exact", lambda: False)
    assert measure_gemm() == GemmChoice(NEVER, 0, 0.0, 0.0)


def test_saturation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_sixteen_bits(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        pairs = (rows.int() + 128)[:, :, None] * weights.int()[None]
        pairs = pairs.view(len(rows), -1, 2, weights.shape[1]).sum(2).clamp(-32768, 32767)
        return pairs.sum(1) - 128 * weights.int().sum(0)

    home.int_mm_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", in_sixteen_bits)
    found = home.int_mm_is_exact()
    home.int_mm_is_exact.cache_clear()
    assert not found


def test_measuring_leaves_the_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "MOST_ROWS", 32)
    found = measure_gemm()
    assert found.measured_rows in (0, 16, 32)
    asked: list[object] = []
    monkeypatch.setattr(torch, "_int_mm", lambda *some, **_: asked.append(some))
    form = TileFormat("int8")
    matrix = tile_matrix(encode(torch.randn(16, 64), form), form, 16, 64)
    linear(torch.randn(40, 64), matrix, None, Scratch())
    assert not asked


CHOICE = GemmChoice(256, 256, 100.0, 120.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GemmChoice]]:
    """What is measured, one after the other; what remains was not."""
    coming = [CHOICE, GemmChoice(NEVER, 1024, 3.0, 2.0), CHOICE]
    monkeypatch.setattr(note, "measure_gemm", lambda: coming.pop(0))
    note._measured.cache_clear()
    yield coming
    note._measured.cache_clear()


def test_it_is_measured_once_for_a_processor(
    tmp_path: Path, measured: list[GemmChoice], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / GEMM_NOTE
    assert kept_gemm(path, 1) == CHOICE
    note._measured.cache_clear()  # as in another process
    assert kept_gemm(path, 1) == CHOICE and len(measured) == 2
    assert kept_gemm(path, 2).least_rows == NEVER and len(measured) == 1
    monkeypatch.setattr(note, "_processor", lambda: "another")
    assert kept_gemm(path, 2) == CHOICE and not measured


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"of": 3}', "[" * 5000, '{"of": "HERE", "least_rows": "256"}']
)
def test_a_note_that_says_nothing_is_written_anew(
    text: str, tmp_path: Path, measured: list[GemmChoice]
) -> None:
    path = tmp_path / GEMM_NOTE
    path.write_text(text.replace("HERE", note._here(1)), "utf-8")
    assert kept_gemm(path, 1) == CHOICE and len(measured) == 2
    note._measured.cache_clear()
    assert kept_gemm(path, 1) == CHOICE and len(measured) == 2
    assert [each.name for each in tmp_path.iterdir()] == [GEMM_NOTE]


def test_what_cannot_be_kept_serves(
    tmp_path: Path, measured: list[GemmChoice], caplog: pytest.LogCaptureFixture
) -> None:
    assert kept_gemm(tmp_path / "none" / GEMM_NOTE, 1) == CHOICE and len(measured) == 2
    assert "could not be kept" in caplog.text


def test_the_log_says_which_and_why() -> None:
    assert gemm_line(GemmChoice(256, 256, 178e9, 207e9)) == (
        "int8 by torch's _int_mm from 256 rows an expert on (with 256 rows 207 G/s, the library"
        " 178 G/s)"
    )
    assert gemm_line(GemmChoice(NEVER, 1024, 588e9, 397e9)) == (
        "int8 of many rows by the library (with 1024 rows 588 G/s, torch's _int_mm 397 G/s)"
    )
    assert "saturates" in gemm_line(GemmChoice(NEVER, 0, 0.0, 0.0))
