"""`int4`: half a byte per weight in groups of 64, and two ways to multiply with it on the CPU.

A group of a row keeps w = step * q + low with q of 0..15. Steps and lows are whole numbers of
steps of an int8 row: what int8 could say of a row in 255 values, a group says in 16 of them. So one
stored form serves two kernels: torch's int4 product, which reads half the bytes (few rows: memory
bounds it), and the int8 product of rows expanded once (many rows: arithmetic bounds it, and int8
takes a fifth of the time). Group-wise rounding with a search for the least squared error; the
double quantization of the steps follows QLoRA (arXiv 2305.14314).

Shape letters: E experts, N outputs, K inputs, n rows, g numbers per group.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from moestro.engine.facts import ModelRefused

from .matrices import (
    TINIEST,
    Int8Matrix,
    Layout,
    Quantized,
    Source,
    Span,
    biases,
    biases_layout,
    matrices_of,
    matrix_sides,
    multiply_int8,
    quantize_rows,
)

GRID = "grid"  # beside matrix `x`: `x.grid`, bf16 [K/g, N, 2]: step, and the value of q = 8
GROUPS = (64, 32)
LARGEST, TOP = 127, 15  # of an int8, of a q
MOST_STEPS = 17  # TOP of them reach from one end of an int8 to the other
SHRINKS = (1.0, 0.9, 0.8)  # of a group's range: cutting its ends off can halve the error within
EXPAND_ROWS = 40
"""From so many rows on, expanding the matrix first is faster; measured at 2048 x 2048."""
ROWS_AT_ONCE = 256  # encoded together: their fp32 copies stay in the caches


class Int4Matrix(NamedTuple):
    """Views into a slot."""

    packed: torch.Tensor  # uint8 [N, K/2], in the order of torch's kernel
    grid: torch.Tensor  # bf16 [K/g, N, 2]
    group: int


class Int4Rows:
    """Rows in the form that a kernel asks for, made when it does."""

    def __init__(
        self, rows: torch.Tensor, of: "Int4Rows | None" = None, places: torch.Tensor | None = None
    ) -> None:
        self._rows, self._of, self._places = rows, of, places

    def __len__(self) -> int:
        return len(self._rows if self._places is None else self._places)

    def take(self, places: torch.Tensor) -> "Int4Rows":
        return Int4Rows(self._rows, self, places)

    @cached_property
    def half(self) -> torch.Tensor:
        """bf16 [n, K]"""
        if self._of is not None and self._places is not None:
            return self._of.half.index_select(0, self._places)
        return self._rows.to(torch.bfloat16)

    @cached_property
    def digits(self) -> Quantized:
        if self._of is not None and self._places is not None:
            values, scale = self._of.digits
            return values.index_select(0, self._places), scale.index_select(0, self._places)
        return quantize_rows(self._rows)


class Int4Codec:
    """Matrices as int4 with a grid; everything else (biases) as fp32."""

    tiled = False

    def __init__(self) -> None:
        # The order of a packed matrix is the processor's: a pack of another one is not readable.
        self.name = f"int4-{torch.backends.cpu.get_cpu_capability().lower()}"
        self._expanded = torch.empty(0, dtype=torch.uint8)  # one matrix, until the next one

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        found = biases_layout(tensors)
        for name, outputs, inputs in matrix_sides(tensors, transposed):
            if outputs % 16 or inputs % GROUPS[-1]:
                raise ModelRefused(
                    f"--expert-format int4: {name} is {outputs} x {inputs}, and only multiples of"
                    f" 16 x {GROUPS[-1]} can be kept in it; use int8"
                )
            found[name] = ("uint8", (outputs, inputs // 2))
            found[f"{name}.{GRID}"] = ("bfloat16", (inputs // group_of(inputs), outputs, 2))
        return found

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        found = biases(tensors)
        for name, matrix in matrices_of(tensors, transposed):
            pairs = [encode_int4(weight) for weight in matrix]
            found[name] = torch.stack([packed for packed, _ in pairs])
            found[f"{name}.{GRID}"] = torch.stack([grid for _, grid in pairs])
        return found

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> Int4Matrix:
        packed, grid = tensors[name], tensors[f"{name}.{GRID}"]
        return Int4Matrix(packed, grid, 2 * packed.shape[1] // len(grid))

    def begin(self, rows: torch.Tensor) -> Int4Rows:
        return Int4Rows(rows)

    def take(self, rows: Int4Rows, places: torch.Tensor) -> Int4Rows:
        return rows.take(places)

    def multiply(self, rows: Int4Rows, matrix: Int4Matrix) -> torch.Tensor:
        block = block_rows()
        if len(rows) >= EXPAND_ROWS and block and len(matrix.packed) % block == 0:
            return multiply_int8(rows.digits, self._expand(matrix, block))
        return multiply_int4(rows, matrix)

    def multiply_each(
        self, rows: Int4Rows, spans: Sequence[Span], matrices: Sequence[Int4Matrix]
    ) -> torch.Tensor:
        return _each_into_one(rows.half, spans, matrices)

    def multiply_apart(self, rows: Int4Rows, matrices: Sequence[Int4Matrix]) -> torch.Tensor:
        only = len(rows) == 1
        spans = [(0, 1) if only else (place, place + 1) for place in range(len(matrices))]
        return _each_into_one(rows.half, spans, matrices)

    def _expand(self, matrix: Int4Matrix, block: int) -> Int8Matrix:
        """int8 [K, N] and the scales [N] of the same weights, valid until the next call."""
        packed, grid, group = matrix
        outputs, inputs = len(packed), 2 * packed.shape[1]
        scale, steps, lows = whole_steps(grid)
        if self._expanded.numel() < outputs * inputs:
            self._expanded = torch.empty(outputs * inputs, dtype=torch.uint8)
        # Of each block's rows the kernel keeps one half in the low bits, the other in the high.
        nibbles = packed.view(outputs // block, inputs, block // 2).transpose(0, 1)
        whole = self._expanded[: outputs * inputs].view(inputs, outputs // block, block)
        torch.bitwise_and(nibbles, TOP, out=whole[..., : block // 2])
        torch.bitwise_right_shift(nibbles, 4, out=whole[..., block // 2 :])
        # q * step can pass 127; it wraps, and wraps back with the low.
        grouped = whole.view(torch.int8).view(inputs // group, group, outputs)
        grouped.mul_(steps[:, None]).add_(lows[:, None])
        return grouped.view(inputs, outputs), scale


def multiply_int4(rows: Int4Rows, matrix: Int4Matrix) -> torch.Tensor:
    """Rows times a matrix -> fp32 [n, N], summed in fp32 and rounded to bf16 by the kernel."""
    packed, grid, group = matrix
    return torch._weight_int4pack_mm_for_cpu(rows.half, packed, group, grid).float()


def _each_into_one(
    half: torch.Tensor, spans: Sequence[Span], matrices: Sequence[Int4Matrix]
) -> torch.Tensor:
    multiply = torch._weight_int4pack_mm_for_cpu
    products = [
        multiply(half[start:end], packed, group, grid)
        for (start, end), (packed, grid, group) in zip(spans, matrices, strict=True)
    ]
    return torch.cat(products).float()


def encode_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] -> uint8 [N, K/2] in the kernel's order, and the grid bf16 [K/g, N, 2]."""
    group = group_of(weight.shape[1])
    parts = [_nearest(rows.float(), group) for rows in torch.split(weight, ROWS_AT_ONCE)]
    levels = torch.cat([levels for levels, _, _ in parts])  # [N, K]
    step = torch.cat([step for _, step, _ in parts])  # [N, K/g]
    middle = torch.cat([middle for _, _, middle in parts])
    grid = torch.stack([step.t(), middle.t()], dim=2).to(torch.bfloat16)
    packed = torch._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 1)
    return packed, grid.contiguous()


def group_of(inputs: int) -> int:
    return next(group for group in GROUPS if inputs % group == 0)


def _nearest(rows: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [n, K] -> q [n, K], and step and middle (the value of q = 8) [n, K/g].

    Of a few ranges, each group takes the one with the least squared error. The group with the
    row's largest number keeps that end of its range where int8 ends, so that `whole_steps` finds
    the same whole numbers again.
    """
    count, inputs = rows.shape
    largest = rows.abs().amax(dim=1).clamp_(min=TINIEST)
    unit = (largest / LARGEST)[:, None, None]
    values = rows.view(count, inputs // group, group) / unit  # in steps of int8: -127..127
    low, high = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
    at_top, at_bottom = high >= LARGEST - 1e-3, low <= -(LARGEST - 1e-3)
    best: tuple[torch.Tensor, ...] | None = None
    for shrink in SHRINKS:
        step = ((high - low) * (shrink / TOP)).round_().clamp_(1, MOST_STEPS)
        bottom = ((high + low - TOP * step) / 2).round_()
        bottom = torch.where(at_top, LARGEST - TOP * step, bottom)
        bottom = torch.where(at_bottom & ~at_top, torch.full_like(bottom, -LARGEST), bottom)
        bottom = torch.minimum(bottom.clamp_(min=-LARGEST - 1), LARGEST - TOP * step)
        levels = ((values - bottom) / step).round_().clamp_(0, TOP)
        error = (levels * step).add_(bottom).sub_(values).square_().sum(dim=2, keepdim=True)
        found = (error, levels, step, bottom)
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = tuple(
                torch.where(better, new, old) for new, old in zip(found, best, strict=True)
            )
    assert best is not None
    _, levels, step, bottom = best
    middle = (bottom + 8 * step) * unit
    return levels.view(count, inputs), (step * unit)[:, :, 0], middle[:, :, 0]


def whole_steps(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 [K/g, N, 2] -> fp32 scales [N] of int8 rows, and steps and lows int8 [K/g, N] in them.

    A row's largest end is 127; the grid's bf16 is too coarse to say where that is, so it is taken
    from all groups together.
    """
    step, middle = grid.float().unbind(2)
    ends = torch.maximum((middle + 7 * step).abs(), (middle - 8 * step).abs())
    unit = ends.amax(dim=0) / LARGEST
    whole = (step / unit).round_()
    unit = (step * whole).sum(dim=0) / whole.square().sum(dim=0)
    both, found = torch.cat([step, middle]), torch.cat([whole, (middle / unit).round_()])
    unit = (both * found).sum(dim=0) / found.square().sum(dim=0)
    low = (middle / unit).round_().sub_(whole, alpha=8).clamp_(-LARGEST - 1, LARGEST)
    return unit, whole.to(torch.int8), low.to(torch.int8)


@lru_cache(maxsize=1)
def block_rows() -> int:
    """How many rows this processor's packed order interleaves; 0 if it is not one known here."""
    for block in (64, 32):
        levels = torch.arange(block * 64, dtype=torch.int32).view(block, 64) % (TOP + 1)
        packed = torch._convert_weight_to_int4pack_for_cpu(levels, 1).view(64, block // 2)
        half = levels.view(2, block // 2, 64).transpose(1, 2)  # [low bits or high, K, row]
        if torch.equal(packed.int(), half[0] | half[1] << 4):
            return block
    return 0
