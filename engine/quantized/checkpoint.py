"""The slices of a quantized checkpoint's files as those of the plain one that it stands for."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from moestro.engine.facts import ModelRefused

from .bits4 import bitsandbytes_slices
from .compressed import compressed_slices
from .config import FIELD, Quantization
from .float8 import float8_slices, mxfp4_slices
from .groups import awq_slices, gptq_slices
from .slices import Decoded, Slice, Slices

Found = tuple[Mapping[str, Decoded], set[str]]  # by plain name, and the keys that they are made of
Finder = Callable[[Slices, Quantization, torch.dtype], Found]

METHODS: Mapping[str, Finder] = MappingProxyType(
    {
        "fp8": float8_slices,
        "mxfp4": mxfp4_slices,
        "gptq": gptq_slices,
        "awq": awq_slices,
        "compressed-tensors": compressed_slices,
        "bitsandbytes": bitsandbytes_slices,
    }
)


def refuse_method(quantization: Quantization) -> None:
    """Raises ModelRefused for a method that is not carried."""
    if quantization.method not in METHODS:
        raise ModelRefused(
            f"{quantization.path}: {FIELD}.quant_method is {quantization.method!r}, which is not "
            f"carried; use a checkpoint in bf16 or fp16, or in one of {', '.join(METHODS)}"
        )


def plain_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> dict[str, Slice]:
    """Everything in `slices`, quantized tensors under the names and shapes of plain ones.

    `dtype` is what they are rounded to once decoded. Raises ModelRefused for a method that is not
    carried, and where fields and files contradict each other.
    """
    refuse_method(quantization)
    method = quantization.method
    found, taken = METHODS[method](slices, quantization, dtype)
    if not found:
        raise ModelRefused(
            f"{quantization.path}: {FIELD} says {method}, and no tensor of the files is; the two "
            "are not of one model, fetch them again"
        )
    return {key: part for key, part in slices.items() if key not in taken} | dict(found)
