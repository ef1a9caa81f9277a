"""The formats in tiles, multiplied by the library's products (engine/kernels).

`native` keeps the checkpoint's dtype, widened as it is read. `int8` has one scale per output row
and takes activations as int8 by each row's own maximum; `int4` has a scale and a zero in groups of
inputs, and activations by the same groups. Integer products are exact, so company in the batch
cannot change a row by a bit. `mxfp4` has four-bit floats and a power of two for 32 of them: weights
that lie on such a grid, as a checkpoint in MXFP4 has them, are kept as they are. `fp8` is e4m3 with
a scale in groups of inputs, multiplied with as floats. Where a checkpoint's own int4 or fp8 has
codes, scales and zeros that a tile can hold, these are put into it, and nothing is rounded.

A matrix `x` of [N, K] is `x`, uint8 [T, tile_bytes], and beside it a tensor without bytes whose
name says the format and whose shape says N and K.

Shape letters: E experts, N outputs, K inputs, n rows, T tiles.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moestro.engine.facts import ModelRefused
from moestro.engine.kernels import (
    TILE16,
    UNIT,
    WIDEST_GROUP,
    Scratch,
    TileFormat,
    TileMatrix,
    encode,
    linear,
    pack_codes,
    tile_matrix,
)

from .experts_module import ExpertsModule
from .matrices import Layout, Source, Span, biases, biases_layout, matrices_of, matrix_sides

ORDER = ".order"  # behind the name of a matrix whose inputs lie in an order of their own
MARK = "@"  # between the name of a matrix and its format
GROUPS = (64, 32)  # of int4
MXFP4_GROUP = 32
FP8_GROUP = 128
LINE_INPUTS = 4  # of fp8: a group is whole lines
PLAIN = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def tile_format(name: str, stored: torch.dtype, inputs: int) -> TileFormat:
    """How the format that a flag calls `name` keeps a matrix of that dtype and so many inputs.

    Raises ModelRefused for a dtype that no product takes.
    """
    if name == "int8":
        return TileFormat("int8")
    if name == "int4":
        group = next((group for group in GROUPS if inputs % group == 0), GROUPS[-1])
        return TileFormat("int4", group, "float16", "float")
    if name == "mxfp4":
        return TileFormat("mxfp4", MXFP4_GROUP)
    if name == "fp8":
        return TileFormat("fp8", FP8_GROUP)
    if stored not in PLAIN:
        raise ModelRefused(f"weights of {stored} cannot be multiplied with as they are; use int8")
    return TileFormat(PLAIN[stored])


def grid_format(kind: str, group: int, scale: str, zero: str, inputs: int) -> TileFormat | None:
    """Of a matrix that is quantized so, in words of TileFormat; None where no tile can hold it."""
    width = group or inputs
    if kind == "int4" and (width % UNIT or inputs % width or width >= WIDEST_GROUP):
        return None
    if kind == "fp8" and width % LINE_INPUTS:
        return None
    return TileFormat(kind, 0 if width == inputs else group, scale, zero)


class Codes(NamedTuple):
    """Matrices as a checkpoint has them quantized."""

    codes: torch.Tensor  # uint8 [E, N, K]
    scales: torch.Tensor  # [E, N, G]
    zeros: torch.Tensor | None  # [E, N, G], as TileFormat has them
    orders: torch.Tensor | None  # int32 [E, K]: which input is the tile's first, second, ...


class TileCodec:
    """Matrices in tiles; everything else (biases) as fp32. Computes in fp32, on a CPU."""

    tiled = True

    def __init__(self, name: str) -> None:
        """`name` as the flags have it."""
        self.name = f"{name}-{TILE16}"
        self._format = name
        self.scratch = Scratch()

    def keeps(self, entry: ExpertsModule) -> bool:
        """Whether this format has its matrices as the files have them."""
        return {grid.kind for grid in entry.grids.values()} == {self._format}

    def layout_of(self, entry: ExpertsModule) -> Layout:
        """As `layout`, with the grids that it keeps."""
        kept = entry.grids if self.keeps(entry) else {}
        found = self._layout(entry.tensors, entry.transposed, kept)
        for name in entry.orders if kept else ():
            found[name + ORDER] = ("int32", (entry.tensors[name][1][2],))
        return found

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        return self._layout(tensors, transposed, {})

    def _layout(self, tensors: Source, transposed: bool, grids: Mapping[str, TileFormat]) -> Layout:
        found = biases_layout(tensors)
        for name, outputs, inputs in matrix_sides(tensors, transposed):
            form = grids.get(name) or tile_format(self._format, tensors[name][0], inputs)
            found[name] = ("uint8", form.shape(outputs, inputs))
            found[name + MARK + form.tag] = ("uint8", (outputs, inputs, 0))
        return found

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        found = biases(tensors)
        for name, matrix in matrices_of(tensors, transposed):
            experts, outputs, inputs = matrix.shape
            form = tile_format(self._format, matrix.dtype, inputs)
            stored = torch.empty((experts, *form.shape(outputs, inputs)), dtype=torch.uint8)
            for expert, weight in enumerate(matrix):
                stored[expert] = encode(weight, form)
            found[name] = stored
            found[name + MARK + form.tag] = _mark(matrix.shape)
        return found

    def encode_codes(
        self, each: Mapping[str, Codes], grids: Mapping[str, TileFormat]
    ) -> dict[str, torch.Tensor]:
        """As `layout_of` has them. Nothing is rounded."""
        found = {}
        for name, (codes, scales, zeros, orders) in each.items():
            form = grids[name]
            shape = form.shape(*codes.shape[1:])
            found[name] = torch.empty((len(codes), *shape), dtype=torch.uint8)
            for expert, numbers in enumerate(codes):
                zero = None if zeros is None else zeros[expert]
                if orders is not None:
                    numbers = numbers.index_select(1, orders[expert])
                found[name][expert] = pack_codes(numbers, scales[expert], zero, form)
            found[name + MARK + form.tag] = _mark(codes.shape)
            if orders is not None:
                found[name + ORDER] = orders
        return found

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> TileMatrix:
        mark = next(key for key in tensors if key.startswith(name + MARK))
        outputs, inputs, _ = tensors[mark].shape
        form = TileFormat.of_tag(mark.removeprefix(name + MARK))
        order = tensors.get(name + ORDER)
        return tile_matrix(tensors[name], form, outputs, inputs, order=order)

    def begin(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float().contiguous()

    def take(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, places)

    def multiply(self, rows: torch.Tensor, matrix: TileMatrix) -> torch.Tensor:
        return linear(rows, matrix, None, self.scratch)

    def multiply_each(
        self, rows: torch.Tensor, spans: Sequence[Span], matrices: Sequence[TileMatrix]
    ) -> torch.Tensor:
        each = zip(spans, matrices, strict=True)
        return torch.cat([self.multiply(rows[start:end], matrix) for (start, end), matrix in each])

    def multiply_apart(self, rows: torch.Tensor, matrices: Sequence[TileMatrix]) -> torch.Tensor:
        each = torch.split(rows, 1) if len(rows) > 1 else (rows,) * len(matrices)
        parts = [self.multiply(row, matrix) for row, matrix in zip(each, matrices, strict=True)]
        return torch.cat(parts)


def _mark(shape: torch.Size) -> torch.Tensor:
    """[E, N, K] without bytes"""
    return torch.empty((*shape, 0), dtype=torch.uint8)
