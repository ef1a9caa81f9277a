"""Stored formats of experts: bytes of a matrix and the products with it. Knows no checkpoint."""

from .experts_module import ExpertsModule, is_experts_module
from .matrices import Codec, Fine, Span, multiply_fine, per_row, quantize_fine, quantize_rows
from .mixed import (
    MIXED,
    FormatMap,
    MixedCodec,
    as_tile,
    encode_layer,
    expert_codec,
    keeps_grids,
    mix_by_trace,
    order_of,
    pack_layer,
)
from .named import AUTO, FORMATS, codec_of, in_tiles
from .tiled import Codes, grid_format, tile_format

__all__ = [
    "AUTO",
    "MixedCodec",
    "Codec",
    "Codes",
    "ExpertsModule",
    "FORMATS",
    "Fine",
    "FormatMap",
    "MIXED",
    "Span",
    "as_tile",
    "codec_of",
    "encode_layer",
    "expert_codec",
    "grid_format",
    "in_tiles",
    "is_experts_module",
    "keeps_grids",
    "mix_by_trace",
    "multiply_fine",
    "order_of",
    "pack_layer",
    "per_row",
    "quantize_fine",
    "quantize_rows",
    "tile_format",
]
