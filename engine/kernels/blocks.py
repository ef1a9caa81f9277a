"""Copies of some outputs, or of some inputs, of a matrix in tiles: 16 of them are a block.

A block of outputs is one tile. A block of inputs is whole lines of every tile (4 of int8, 8 of
bfloat16 and float16, 16 of float32), so the order inside a line stays as it is.
"""

from collections.abc import Sequence

import torch

from .layout import LINE_BYTES, TILE_ROWS, TileFormat
from .pack import OFFSET

BLOCK = TILE_ROWS
CUT = ("float32", "bfloat16", "float16", "int8")  # kinds whose inputs can be taken apart


def keep_outputs(tiles: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """Blocks of outputs of uint8 [T, tile_bytes], in this order -> [len(blocks), tile_bytes]."""
    return tiles.index_select(0, torch.tensor(blocks))


def keep_inputs(
    tiles: torch.Tensor, form: TileFormat, inputs: int, blocks: Sequence[int]
) -> torch.Tensor:
    """Blocks of inputs of a matrix of whole blocks, uint8 [T, tile_bytes] -> of fewer inputs.

    No number changes: int8 keeps the scales of its outputs. `form.kind` is of CUT.
    """
    assert form.kind in CUT and inputs % BLOCK == 0, "a block of inputs is no whole lines"
    count, one = len(tiles), LINE_BYTES * BLOCK // form.inputs_of_line
    whole = inputs // BLOCK * one
    kept = tiles[:, :whole].view(count, -1, one).index_select(1, torch.tensor(blocks))
    parts = [kept.view(count, -1)]
    if form.kind == "int8":
        padding = form.padded(BLOCK * len(blocks)) // BLOCK - len(blocks)
        parts.append(tiles.new_full((count, padding * one), OFFSET))  # weights of zero
        scales = form.tile_bytes(inputs) - form.padded(inputs) // BLOCK * one
        parts.append(tiles[:, -scales:])
    return torch.cat(parts, dim=1)
