"""int4: one stored form, two kernels; and what is kept of a matrix."""

import pytest
import torch

from moestro.engine.facts.errors import ModelRefused
from moestro.engine.formats.int4 import (
    EXPAND_ROWS,
    GRID,
    Int4Codec,
    block_rows,
    encode_int4,
    whole_steps,
)
from moestro.engine.formats.named import codec_of

EXPERTS, OUT, IN = 2, 128, 256


def encoded(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first expert of [E, N, K] as a slot would hold it."""
    return {
        name: tensor[0] for name, tensor in Int4Codec().encode({"up_proj": weight}, False).items()
    }


def test_half_a_byte_and_a_sixteenth_for_the_grid() -> None:
    layout = Int4Codec().layout({"up_proj": (torch.bfloat16, (8, 1024, 512))}, False)
    assert layout == {
        "up_proj": ("uint8", (1024, 256)),
        f"up_proj.{GRID}": ("bfloat16", (8, 1024, 2)),
    }
    bits = 8 * (1024 * 256 + 8 * 1024 * 2 * 2) / (1024 * 512)
    assert bits == 4.5


@pytest.mark.parametrize(("spread", "error"), [(0.0, 0.095), (2.0, 0.12)])
def test_what_is_lost(spread: float, error: float) -> None:
    """Of normal weights, and of rows whose groups differ in size by far."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, OUT, IN)
    weight *= (
        (spread * torch.randn(EXPERTS, OUT, IN // 64, 1))
        .exp()
        .expand(-1, -1, -1, 64)
        .reshape(weight.shape)
        if spread
        else 1
    )
    codec, one = Int4Codec(), encoded(weight)
    matrix = codec.open(one, "up_proj", False)
    back = codec.multiply(codec.begin(torch.eye(IN)[:16]), matrix)  # [16, N]: columns of the matrix
    wanted = weight[0][:, :16].t()
    assert (back - wanted).norm() < error * wanted.norm()


def test_both_kernels_know_the_same_weights() -> None:
    torch.manual_seed(1)
    codec, one = Int4Codec(), encoded(torch.randn(EXPERTS, OUT, IN))
    matrix = codec.open(one, "up_proj", False)
    assert block_rows() in (32, 64), "this processor's order is not known: no expansion"
    values, scale = codec._expand(matrix, block_rows())
    direct = torch._weight_int4pack_mm_for_cpu(
        torch.eye(IN, dtype=torch.bfloat16), matrix.packed, matrix.group, matrix.grid
    ).float()
    # bf16 holds 8 bits of a weight; the whole steps must be the same.
    assert ((values.float() * scale - direct).abs() <= 0.8 * scale).all()


def test_steps_come_back_whole() -> None:
    """The grid is kept in bf16, too coarse for a row's unit by itself: the whole numbers must be
    found again, or prompts would see other weights than decoding."""
    torch.manual_seed(2)
    weight = torch.randn(512, 2048) * torch.rand(512, 1).exp()
    weight[7, 100] = 30.0
    weight[9] = 0.0
    _, grid = encode_int4(weight)
    unit, steps, lows = whole_steps(grid)
    step, middle = grid.float().unbind(2)
    live = [row for row in range(512) if row != 9]
    assert ((steps * unit - step).abs() <= 0.008 * step)[:, live].all()
    ends = lows.float() + 8 * steps.float()
    assert ((ends * unit - middle).abs() <= 0.8 * unit)[:, live].all()
    assert torch.isfinite(unit[live]).all()


def test_many_rows_take_the_int8_kernel_and_agree_with_few() -> None:
    torch.manual_seed(3)
    codec, one = Int4Codec(), encoded(torch.randn(EXPERTS, OUT, IN))
    matrix = codec.open(one, "up_proj", False)
    rows = torch.randn(EXPAND_ROWS, IN)
    many = codec.multiply(codec.begin(rows), matrix)
    few = codec.multiply(codec.begin(rows[:4]), matrix)
    assert not torch.equal(many[:4], few), "the same kernel was taken twice"
    assert (many[:4] - few).norm() < 0.02 * few.norm()


def test_zero_rows_and_columns_stay_zero() -> None:
    weight = torch.randn(EXPERTS, OUT, IN)
    weight[:, 3] = 0
    codec, one = Int4Codec(), encoded(weight)
    matrix = codec.open(one, "up_proj", False)
    for count in (1, EXPAND_ROWS):
        out = codec.multiply(codec.begin(torch.randn(count, IN)), matrix)
        assert torch.isfinite(out).all()
        assert (out[:, 3].abs() < 1e-6).all()


def test_odd_shapes_are_refused_with_the_way_out() -> None:
    with pytest.raises(ModelRefused, match="30 x 64.*use int8"):
        codec_of("int4", torch.float32, rows=True).layout(
            {"up_proj": (torch.bfloat16, (8, 30, 64))}, False
        )
