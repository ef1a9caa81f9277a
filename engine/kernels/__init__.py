"""Products with matrices in tiles of 16 rows, by a C library. Knows pointers, no model."""

from .blocks import BLOCK, CUT, keep_inputs, keep_outputs
from .layer import LayerParts, LayerStep, StepRoom
from .layout import ROWS, TILE16, TileFormat
from .library import MISSING, chosen, instruction_sets, library, set_pool_threads
from .pack import encode
from .products import (
    Activation,
    Routed,
    Scratch,
    TileExpert,
    TileMatrix,
    combine,
    energies_of,
    known_activation,
    linear,
    multiply_experts,
    tile_matrix,
)
from .step import (
    LANES,
    MOST_GROUP,
    AttentionWeights,
    Norm,
    Router,
    Rows,
    attend,
    attend_stored,
    normalize,
    route,
    tile_attention,
)

__all__ = [
    "Activation",
    "AttentionWeights",
    "BLOCK",
    "CUT",
    "LANES",
    "LayerParts",
    "LayerStep",
    "MISSING",
    "MOST_GROUP",
    "Norm",
    "ROWS",
    "Routed",
    "Router",
    "Rows",
    "Scratch",
    "StepRoom",
    "TILE16",
    "TileExpert",
    "TileFormat",
    "TileMatrix",
    "attend",
    "attend_stored",
    "chosen",
    "combine",
    "encode",
    "energies_of",
    "instruction_sets",
    "keep_inputs",
    "keep_outputs",
    "known_activation",
    "library",
    "linear",
    "multiply_experts",
    "normalize",
    "route",
    "set_pool_threads",
    "tile_attention",
    "tile_matrix",
]
