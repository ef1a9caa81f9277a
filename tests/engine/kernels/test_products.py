"""The library's products against the meaning of the bytes, on all instruction sets there are."""

import pytest
import torch

from moestro.engine.kernels import (
    Scratch,
    TileFormat,
    encode,
    linear,
    tile_matrix,
)
from moestro.engine.kernels.library import fetch_ahead
from tile_reference import decode

FORMATS = (
    TileFormat("float32"),
    TileFormat("bfloat16"),
    TileFormat("float16"),
    TileFormat("fp8", 128),
    TileFormat("int8"),
    TileFormat("int4", 64, "float16", "float"),
    TileFormat("int4", 32, "float16", "none"),
    TileFormat("int4", 128, "bfloat16", "integer"),
    TileFormat("int4", 0, "float32", "float"),
    TileFormat("mxfp4", 32),
)
SHAPES = ((48, 64), (37, 96), (16, 32), (5, 40), (130, 260))
COUNTS = (1, 2, 3, 7, 16, 17, 33, 64, 100)


def rounded(rows: torch.Tensor, group: int) -> torch.Tensor:
    """fp32 [n, K] as int8 by each group's largest says it."""
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group))
    grouped = filled.view(len(rows), -1, group)
    step = grouped.abs().amax(dim=2, keepdim=True) / 127
    levels = torch.where(step > 0, (grouped * (1 / step)).round(), 0.0)
    return (levels.double() * step).view(len(rows), -1)[:, : rows.shape[1]]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tag)
def test_products_are_those_of_the_bytes_whoever_is_in_company(
    form: TileFormat, instruction_set: str
) -> None:
    torch.manual_seed(0)
    for outputs, inputs in SHAPES:
        stored = encode(torch.randn(outputs, inputs), form)
        assert stored.shape == form.shape(outputs, inputs)
        weight = decode(stored, form, outputs, inputs).double()
        matrix, scratch = tile_matrix(stored, form, outputs, inputs), Scratch()
        rows, bias = torch.randn(max(COUNTS), inputs), torch.randn(outputs)
        group = inputs if form.kind == "int8" else form.group_of(inputs)
        exact = rows.double() if form.is_float else rounded(rows, group)
        wanted = exact @ weight.t() + bias
        together = linear(rows, matrix, bias, scratch)
        assert (together - wanted).abs().max() <= 2e-5 * wanted.abs().max()
        for count in COUNTS:
            found = linear(rows[:count].contiguous(), matrix, bias, scratch)
            assert torch.equal(found, together[:count]), (form, outputs, inputs, count)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_more_rows_than_a_cache_keeps_are_each_their_own(kind: str, instruction_set: str) -> None:
    torch.manual_seed(0)
    outputs, inputs, form = 40, 24000, TileFormat(kind)
    matrix = tile_matrix(encode(torch.randn(outputs, inputs), form), form, outputs, inputs)
    rows = torch.randn(150, inputs)
    together = linear(rows, matrix, None, Scratch())
    for row in (0, 59, 60, 63, 64, 119, 120, 128, 149):
        alone = linear(rows[row : row + 1].contiguous(), matrix, None, Scratch())
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tag)
def test_fetching_ahead_changes_no_bit(form: TileFormat, instruction_set: str) -> None:
    torch.manual_seed(0)
    matrix = tile_matrix(encode(torch.randn(48, 160), form), form, 48, 160)
    some, found = [torch.randn(count, 160) for count in (1, 3, 12)], []
    try:
        for whether in (True, False, None):
            fetch_ahead(whether)
            found.append([linear(rows, matrix, None, Scratch()) for rows in some])
    finally:
        fetch_ahead(None)
    for with_it, without, default in zip(*found, strict=True):
        assert torch.equal(with_it, without) and torch.equal(with_it, default)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tag)
def test_encoded_weights_are_near(form: TileFormat) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    error = (decode(encode(weight, form), form, 32, 128) - weight).norm() / weight.norm()
    most = {"int8": 0.01, "int4": 0.13, "mxfp4": 0.15, "fp8": 0.04, "bfloat16": 3e-3}
    assert error <= most.get(form.kind, 3e-4)


def test_the_largest_bytes_do_not_saturate(instruction_set: str) -> None:
    inputs = 512
    for sign in (1.0, -1.0):
        weight, rows = torch.full((16, inputs), sign), torch.full((2, inputs), 1.0)
        matrix = tile_matrix(encode(weight, TileFormat("int8")), TileFormat("int8"), 16, inputs)
        found = linear(rows, matrix, None, Scratch())
        assert torch.allclose(found, torch.full((2, 16), sign * inputs), rtol=1e-6)


def test_activations_in_groups_keep_what_stands_beside_an_outlier(instruction_set: str) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(32, 256), torch.randn(3, 256)
    rows[:, 5] = 300.0
    form = TileFormat("int8")
    stored = encode(weight, form)
    exact = rows.double() @ decode(stored, form, 32, 256).double().t()
    whole, grouped = (
        linear(rows, tile_matrix(stored, form, 32, 256, group), None, Scratch())
        for group in (0, 64)
    )
    assert (grouped - exact).norm() < 0.55 * (whole - exact).norm()
    wanted = rounded(rows, 64) @ decode(stored, form, 32, 256).double().t()
    assert (grouped - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_visible(value: float, instruction_set: str) -> None:
    for form in FORMATS:
        matrix = tile_matrix(encode(torch.randn(16, 128), form), form, 16, 128)
        rows = torch.randn(2, 128)
        rows[1, 70] = value
        found = linear(rows, matrix, None, Scratch())
        assert torch.isfinite(found[0]).all()
        assert not torch.isfinite(found[1]).any()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tag)
def test_inputs_in_another_order(form: TileFormat, instruction_set: str) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(20, 96), torch.randn(4, 96)
    order = torch.randperm(96)
    stored = encode(weight[:, order].contiguous(), form)
    plain = tile_matrix(stored, form, 20, 96)
    ordered = tile_matrix(stored, form, 20, 96, order=order.to(torch.int32))
    found = linear(rows, ordered, None, Scratch())
    wanted = linear(rows[:, order].contiguous(), plain, None, Scratch())
    assert torch.equal(found, wanted)


def test_views_may_lie_anywhere() -> None:
    """At odd addresses, as part of another tensor: what a mapped file gives."""
    torch.manual_seed(0)
    for form in FORMATS:
        stored = encode(torch.randn(40, 128), form)
        shifted = torch.zeros(stored.numel() + 3, dtype=torch.uint8)
        shifted[3:] = stored.flatten()
        rows = torch.randn(3, 128)
        there = tile_matrix(shifted[3:].view(stored.shape), form, 40, 128)
        here = tile_matrix(stored, form, 40, 128)
        assert torch.equal(
            linear(rows, there, None, Scratch()), linear(rows, here, None, Scratch())
        )
