"""The compressed-tensors format: packed or plain whole numbers, or FP8, with scales.

Letters: O outputs, I inputs, G groups of inputs, b bits. `pack-quantized`: X.weight_packed int32
[O, I b / 32] of numbers plus 2^(b-1), X.weight_scale [O, G], X.weight_shape, with zeros
X.weight_zero_point int32 [O b / 32, G], of reordered inputs X.weight_g_idx [I]. `int-quantized` and
`float-quantized`: X.weight itself in int8 or e4m3, scales of rows, blocks or one for all.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .arithmetic import group_of_input, grouped, unpacked
from .config import Quantization
from .float8 import FLOATS, float8_slice
from .grids import ACT_ORDER, FLOAT_NAMES
from .slices import INT4, Decode, Decoded, Grid, GridForm, Slices

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
ZERO, GROUPS = ".weight_zero_point", ".weight_g_idx"
UNUSED = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale")
Parts = Mapping[str, torch.Tensor]


def compressed_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[dict[str, Decoded], set[str]]:
    """Raises ModelRefused."""
    _check_formats(quantization)
    found: dict[str, Decoded] = {}
    taken = {key for key in slices if key.endswith(UNUSED)}
    for key in slices:
        name = key.removesuffix(SCALE)
        if name == key:
            continue
        kinds = (PACKED, ".weight", SHAPE, SCALE, ZERO, GROUPS)
        parts = {kind: slices[f"{name}{kind}"] for kind in kinds if f"{name}{kind}" in slices}
        if PACKED in parts:
            made = _packed(name, parts, _bits(quantization, parts), quantization, dtype)
        elif ".weight" not in parts:
            raise quantization.misfit(key, f"has no {name}.weight beside it")
        elif parts[".weight"].get_dtype() in FLOATS:
            made = _float8(name, slices, quantization, dtype)
        else:
            made = _integers(name, parts, quantization, dtype)
        found[f"{name}.weight"] = made
        taken |= {f"{name}{kind}" for kind in parts}
    return found, taken


def _groups(quantization: Quantization) -> list[Mapping[str, Any]]:
    """What `config_groups` say of weights. Raises ModelRefused."""
    said = quantization.fields.get("config_groups")
    if not isinstance(said, dict) or not all(isinstance(group, dict) for group in said.values()):
        raise quantization.wrong("config_groups", said, "an object of groups")
    found = [group["weights"] for group in said.values() if isinstance(group.get("weights"), dict)]
    if not found:
        raise quantization.wrong("config_groups", said, "groups of which one has weights")
    return found


def _check_formats(quantization: Quantization) -> None:
    """Raises ModelRefused for one that is not carried."""
    said = quantization.fields.get("config_groups")
    groups = said.values() if isinstance(said, dict) else ()
    inner = [group.get("format") for group in groups if isinstance(group, dict)]
    whole = quantization.fields.get("format")
    for name in [whole, *inner]:
        if name not in (None, "mixed-precision", *FORMATS):
            raise quantization.wrong("format", name, f"one of {', '.join(FORMATS)}")
    _groups(quantization)


def _bits(quantization: Quantization, parts: Mapping[str, Any]) -> int:
    """Of a packed matrix: of what the groups say, what fits it. Raises ModelRefused."""
    said = [group.get("num_bits") for group in _groups(quantization) if group.get("type") == "int"]
    words = parts[PACKED].get_shape()[1]
    inputs = int(parts[SHAPE][...][1]) if SHAPE in parts else None
    for bits in said:
        if bits in (2, 4, 8) and (inputs is None or words == -(-inputs * bits // 32)):
            return int(bits)
    raise quantization.wrong("config_groups.weights.num_bits", said, "2, 4 or 8, as the files are")


def _packed(
    name: str,
    parts: Mapping[str, Any],
    bits: int,
    quantization: Quantization,
    dtype: torch.dtype,
) -> Decoded:
    outputs, words = parts[PACKED].get_shape()
    inputs = int(parts[SHAPE][...][1]) if SHAPE in parts else words * 32 // bits
    scales = tuple(parts[SCALE].get_shape())
    if len(scales) != 2 or scales[0] not in (1, outputs) or scales[1] > inputs:
        raise quantization.misfit(name, f"of shape {(outputs, inputs)} has scales {scales}")

    def decode(tensors: Parts) -> torch.Tensor:
        numbers = unpacked(tensors[PACKED], bits, dim=1)[:, :inputs] - (1 << (bits - 1))
        return _scaled(numbers, tensors, bits)

    used = {kind: part for kind, part in parts.items() if kind not in (SHAPE, ".weight")}
    grid = _grid((outputs, inputs), bits, used)
    return Decoded((outputs, inputs), dtype, used, decode, grid=grid)


def _grid(shape: tuple[int, int], bits: int, parts: Slices) -> Grid | str:
    outputs, inputs = shape
    groups = parts[SCALE].get_shape()[1]
    scale = FLOAT_NAMES.get(parts[SCALE].get_dtype())
    if bits != 4:
        return f"its numbers have {bits} bits"
    if GROUPS in parts:
        return ACT_ORDER
    if scale is None or inputs % groups:
        return f"its scales are {parts[SCALE].get_dtype()}, {groups} a row"

    def codes(tensors: Parts) -> torch.Tensor:
        return unpacked(tensors[PACKED], 4, dim=1)[:, :inputs]

    def zeros(tensors: Parts) -> torch.Tensor:
        found = tensors[ZERO]
        packed = found.dtype == torch.int32
        numbers = unpacked(found, 4, dim=0)[:outputs] if packed else found.to(torch.int32) + 8
        return numbers.expand(outputs, -1)

    def one(kind: str, width: int, dtype: torch.dtype, decode: Decode) -> Decoded:
        return Decoded((outputs, width), dtype, {kind: parts[kind]}, decode)

    return Grid(
        GridForm(INT4, inputs // groups, scale, "integer" if ZERO in parts else "none"),
        one(PACKED, inputs, torch.uint8, codes),
        one(SCALE, groups, getattr(torch, scale), lambda t: t[SCALE].expand(outputs, -1)),
        one(ZERO, groups, torch.uint8, zeros) if ZERO in parts else None,
    )


def _scaled(numbers: torch.Tensor, tensors: Parts, bits: int) -> torch.Tensor:
    outputs, inputs = numbers.shape
    scales = tensors[SCALE]
    groups = tensors.get(GROUPS)
    if groups is None:
        groups = group_of_input(inputs, scales.shape[1])
    groups = groups.long()
    scales = scales.expand(outputs, -1)
    if ZERO in tensors:
        zeros = tensors[ZERO]
        if zeros.dtype == torch.int32:
            zeros = unpacked(zeros, bits, dim=0)[:outputs] - (1 << (bits - 1))
        numbers = numbers - zeros.to(numbers.dtype).expand(outputs, -1)[:, groups]
    return grouped(numbers, scales, groups)


def _integers(
    name: str, parts: Mapping[str, Any], quantization: Quantization, dtype: torch.dtype
) -> Decoded:
    outputs, inputs = parts[".weight"].get_shape()
    scales = tuple(parts[SCALE].get_shape())
    if parts[".weight"].get_dtype() != "I8" or scales not in ((outputs, 1), (1,), (1, 1)):
        kind = parts[".weight"].get_dtype()
        raise quantization.misfit(name, f"is {kind} {(outputs, inputs)} with scales {scales}")

    def decode(tensors: Parts) -> torch.Tensor:
        numbers = tensors[".weight"].to(torch.int32)
        return _scaled(numbers, {**tensors, SCALE: tensors[SCALE].reshape(-1, 1)}, 8)

    return Decoded((outputs, inputs), dtype, parts, decode)


def _float8(name: str, slices: Slices, quantization: Quantization, dtype: torch.dtype) -> Decoded:
    key, scale_key = f"{name}.weight", f"{name}{SCALE}"
    outputs, inputs = slices[key].get_shape()
    scales = tuple(slices[scale_key].get_shape())
    block: tuple[int, int] | None = None
    if scales == (outputs, 1):
        block = (1, inputs)
    elif len(scales) == 2 and scales != (1, 1):
        block = (-(-outputs // scales[0]), -(-inputs // scales[1]))
    return float8_slice(slices, (key, scale_key), block, quantization, dtype)
