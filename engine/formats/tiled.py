"""The formats in tiles, multiplied by the library's products (engine/kernels).

`native` keeps the checkpoint's dtype, widened as it is read. `int8` has one scale per output row
and takes activations as int8 by each row's own maximum; `int4` has a scale and a zero in groups of
inputs, and activations by the same groups. Integer products are exact, so company in the batch
cannot change a row by a bit. `mxfp4` has four-bit floats and a power of two for 32 of them: weights
that lie on such a grid, as a checkpoint in MXFP4 has them, are kept as they are.

A matrix `x` of [N, K] is `x`, uint8 [T, tile_bytes], and beside it a tensor without bytes whose
name says the format and whose shape says N and K.

Shape letters: E experts, N outputs, K inputs, n rows, T tiles.
"""

from collections.abc import Mapping, Sequence

import torch

from moestro.engine.facts import ModelRefused
from moestro.engine.kernels import (
    TILE16,
    Scratch,
    TileFormat,
    TileMatrix,
    encode,
    linear,
    tile_matrix,
)

from .matrices import Layout, Source, Span, biases, biases_layout, matrices_of, matrix_sides

MARK = "@"  # between the name of a matrix and its format
GROUPS = (64, 32)  # of int4
MXFP4_GROUP = 32
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
    if stored not in PLAIN:
        raise ModelRefused(f"weights of {stored} cannot be multiplied with as they are; use int8")
    return TileFormat(PLAIN[stored])


class TileCodec:
    """Matrices in tiles; everything else (biases) as fp32. Computes in fp32, on a CPU."""

    tiled = True

    def __init__(self, name: str) -> None:
        """`name` as the flags have it."""
        self.name = f"{name}-{TILE16}"
        self._format = name
        self.scratch = Scratch()

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        found = biases_layout(tensors)
        for name, outputs, inputs in matrix_sides(tensors, transposed):
            form = tile_format(self._format, tensors[name][0], inputs)
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
            mark = torch.empty((experts, outputs, inputs, 0), dtype=torch.uint8)
            found[name + MARK + form.tag] = mark
        return found

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> TileMatrix:
        mark = next(key for key in tensors if key.startswith(name + MARK))
        outputs, inputs, _ = tensors[mark].shape
        form = TileFormat.of_tag(mark.removeprefix(name + MARK))
        return tile_matrix(tensors[name], form, outputs, inputs)

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
