"""FP8 with scales of blocks (DeepSeek, Qwen3), and MXFP4 (gpt-oss).

A matrix X in e4m3 has X_scale_inv beside it: one number for each block of `weight_block_size`, or
one for all of it. X_blocks and X_scales are MXFP4, rows of 32 numbers and an exponent of 2, and
become X with inputs first, as the class has them.
"""

from collections.abc import Mapping
from math import ceil

import torch

from .arithmetic import block_scaled, fp4_blocks, scale_values
from .config import Quantization
from .slices import FP8, Decoded, Grid, GridForm, Slices

FLOATS = ("F8_E4M3",)
SCALE = "_scale_inv"
UNUSED = (".activation_scale", ".input_scale")  # of what a product's input is rounded to
BLOCKS, EXPONENTS = "_blocks", "_scales"


def float8_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[dict[str, Decoded], set[str]]:
    """Raises ModelRefused."""
    block = _block_size(quantization)
    found: dict[str, Decoded] = {}
    taken = {key for key in slices if key.endswith(UNUSED)}
    for key, part in slices.items():
        if part.get_dtype() not in FLOATS:
            continue
        scale_key = f"{key}{SCALE}"
        if scale_key not in slices:
            raise quantization.misfit(key, f"is FP8 and has no {scale_key} beside it")
        found[key] = float8_slice(slices, (key, scale_key), block, quantization, dtype)
        taken |= {key, scale_key}
    return found, taken


def _block_size(quantization: Quantization) -> tuple[int, int] | None:
    """None: a matrix has one scale. Raises ModelRefused."""
    said = quantization.fields.get("weight_block_size")
    if said is None:
        return None
    if (
        not isinstance(said, list)
        or len(said) != 2
        or any(type(n) is not int or n < 1 for n in said)
    ):
        raise quantization.wrong("weight_block_size", said, "two whole numbers above 0")
    return said[0], said[1]


def float8_slice(
    slices: Slices,
    keys: tuple[str, str],
    block: tuple[int, int] | None,
    quantization: Quantization,
    dtype: torch.dtype,
) -> Decoded:
    """Of the weight and the scales `keys`; of one scale for all where `block` is None.

    Raises ModelRefused where the scales are not as many as the blocks.
    """
    key, scale_key = keys
    shape, scales = (tuple(slices[name].get_shape()) for name in keys)
    if len(shape) not in (2, 3):
        raise quantization.misfit(key, f"is FP8 of shape {shape}, not a matrix")
    rows, columns = block or shape[-2:]
    wanted = (*shape[:-2], ceil(shape[-2] / rows), ceil(shape[-1] / columns))
    alone = scales in ((), (1,)) and block is None and len(shape) == 2
    if scales != wanted and not alone:
        raise quantization.misfit(
            key,
            f"of shape {shape} has scales {scales}, and blocks of {rows} x {columns} need {wanted}",
        )

    def decode(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        numbers = parts["weight"]
        return block_scaled(numbers, parts["scale"].reshape(wanted[-2:]), (rows, columns))

    parts = {"weight": slices[key], "scale": slices[scale_key]}
    leading = len(shape) == 3
    grid = _grid(shape, (rows, columns), parts)
    return Decoded(shape, dtype, parts, decode, leading=leading, grid=grid)


def _grid(shape: tuple[int, ...], block: tuple[int, int], parts: Slices) -> Grid:
    """A scale of each output and block of inputs: its block's."""
    rows, columns = block
    outputs, inputs = shape[-2:]
    groups, leading = ceil(inputs / columns), len(shape) == 3

    def scales(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        each = scale_values(tensors["scale"]).reshape(-1, groups)
        return each.repeat_interleave(rows, dim=0)[:outputs]

    def codes(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return tensors["weight"].view(torch.uint8)

    return Grid(
        GridForm(FP8, 0 if columns == inputs else columns, "float32"),
        Decoded(shape, torch.uint8, {"weight": parts["weight"]}, codes, leading),
        Decoded((*shape[:-1], groups), torch.float32, {"scale": parts["scale"]}, scales, leading),
    )


def mxfp4_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[dict[str, Decoded], set[str]]:
    """Raises ModelRefused."""
    found: dict[str, Decoded] = {}
    taken: set[str] = set()
    for key, part in slices.items():
        name = key.removesuffix(BLOCKS)
        if name == key or f"{name}{EXPONENTS}" not in slices:
            continue
        shape = tuple(part.get_shape())  # [E, O, G, 16]
        scales = tuple(slices[f"{name}{EXPONENTS}"].get_shape())
        if len(shape) != 4 or shape[3] != 16 or scales != shape[:3]:
            raise quantization.misfit(key, f"of shape {shape} has exponents {scales}")
        parts = {"blocks": part, "scales": slices[f"{name}{EXPONENTS}"]}
        found[name] = Decoded(
            (shape[0], shape[2] * 32, shape[1]), dtype, parts, _inputs_first, leading=True
        )
        taken |= {key, f"{name}{EXPONENTS}"}
    return found, taken


def _inputs_first(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return fp4_blocks(parts["blocks"], parts["scales"]).T
