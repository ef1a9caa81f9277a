"""Quantized checkpoints read as plain ones: tensors that are decoded when they are asked for."""

from .checkpoint import METHODS, plain_slices, refuse_method
from .config import Quantization, quantization_of
from .slices import Decoded

__all__ = ["Decoded", "METHODS", "Quantization", "plain_slices", "quantization_of", "refuse_method"]
