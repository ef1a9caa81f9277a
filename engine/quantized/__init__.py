"""Quantized checkpoints read as plain ones: tensors that are decoded when they are asked for."""

from .checkpoint import METHODS, plain_slices, refuse_method
from .config import Quantization, quantization_of
from .grids import form_by_config
from .slices import Decoded, Grid, GridForm

__all__ = [
    "Decoded",
    "Grid",
    "GridForm",
    "METHODS",
    "Quantization",
    "form_by_config",
    "plain_slices",
    "quantization_of",
    "refuse_method",
]
