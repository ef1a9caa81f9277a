"""Products with matrices in tiles of 16 rows, by a C library. Knows pointers, no model."""

from .layout import TILE16, TileFormat
from .library import MISSING, instruction_sets, library
from .pack import encode
from .products import (
    Activation,
    Routed,
    Scratch,
    TileExpert,
    TileMatrix,
    combine,
    known_activation,
    linear,
    multiply_experts,
    tile_matrix,
)

__all__ = [
    "Activation",
    "MISSING",
    "Routed",
    "Scratch",
    "TILE16",
    "TileExpert",
    "TileFormat",
    "TileMatrix",
    "combine",
    "encode",
    "instruction_sets",
    "known_activation",
    "library",
    "linear",
    "multiply_experts",
    "tile_matrix",
]
