"""bitsandbytes: four bits out of a table of sixteen values, or int8 rows.

Four bits: X.weight uint8 [O I / 2, 1], two numbers a byte, the first in the high half; X.weight.
absmax for each block of numbers, itself in bytes where it is nested (Dettmers et al., 2023,
"QLoRA"); X.weight.quant_map has the values, X.weight.quant_state.bitsandbytes__KIND shape and block
size as JSON. Eight bits: X.weight int8 [O, I] and X.SCB [O], the largest size of each row.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from .config import Quantization
from .slices import Decoded, Slices

STATE = ".quant_state.bitsandbytes__"
TABLE, LARGEST = ".quant_map", ".absmax"
NESTED_TABLE, NESTED_LARGEST = ".nested_quant_map", ".nested_absmax"
ROWS, FORM = ".SCB", ".weight_format"
Parts = Mapping[str, torch.Tensor]


def bitsandbytes_slices(
    slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[dict[str, Decoded], set[str]]:
    """Raises ModelRefused."""
    found: dict[str, Decoded] = {}
    taken = {key for key in slices if key.endswith(FORM)}
    for key in slices:
        if STATE in key:
            name = key.partition(STATE)[0]
            made, used = _four_bits(name, key, slices, quantization, dtype)
        elif key.endswith(ROWS):
            name = f"{key.removesuffix(ROWS)}.weight"
            made, used = _eight_bits(name, key, slices, quantization, dtype), {name, key}
        else:
            continue
        found[name] = made
        taken |= used
    return found, taken


def _four_bits(
    name: str, state_key: str, slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> tuple[Decoded, set[str]]:
    state = _state(state_key, slices, quantization)
    kinds = ["", TABLE, LARGEST]
    kinds += [NESTED_TABLE, NESTED_LARGEST] if "nested_blocksize" in state else []
    lost = [kind for kind in kinds if f"{name}{kind}" not in slices]
    if lost:
        raise quantization.misfit(state_key, f"has no {name}{lost[0]} beside it")
    parts = {kind: slices[f"{name}{kind}"] for kind in kinds}
    shape = torch.Size(state["shape"])
    blocks = -(-shape.numel() // state["blocksize"])
    if parts[""].get_shape()[0] != -(-shape.numel() // 2) or parts[LARGEST].get_shape() != [blocks]:
        raise quantization.misfit(
            name, f"is not as large as its shape {tuple(shape)} in {state_key}"
        )

    def decode(tensors: Parts) -> torch.Tensor:
        largest = tensors[LARGEST].float()
        if NESTED_TABLE in tensors:
            spread = tensors[NESTED_LARGEST].repeat_interleave(state["nested_blocksize"])
            largest = tensors[NESTED_TABLE][tensors[LARGEST].long()] * spread[: len(largest)]
            largest = largest + state["nested_offset"]
        packed = tensors[""].flatten()
        numbers = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: shape.numel()]
        spread = largest.repeat_interleave(state["blocksize"])[: shape.numel()]
        return (tensors[TABLE][numbers.long()] * spread).view(shape)

    return Decoded(tuple(shape), dtype, parts, decode), {state_key, *(f"{name}{k}" for k in kinds)}


def _state(key: str, slices: Slices, quantization: Quantization) -> dict[str, Any]:
    """Raises ModelRefused unless its sizes are whole numbers."""
    try:
        found = json.loads(bytes(slices[key][...].tolist()))
        sizes = [found["blocksize"], *found["shape"]]
        if "nested_blocksize" in found:
            sizes.append(found["nested_blocksize"])
            found["nested_offset"] = float(found["nested_offset"])
        if len(found["shape"]) != 2 or any(type(n) is not int or n < 1 for n in sizes):
            raise ValueError(f"sizes {sizes}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise quantization.misfit(key, f"is no state of a quantized tensor ({error})") from error
    return dict(found)


def _eight_bits(
    name: str, key: str, slices: Slices, quantization: Quantization, dtype: torch.dtype
) -> Decoded:
    if name not in slices or slices[name].get_dtype() != "I8":
        raise quantization.misfit(key, f"has no int8 {name} beside it")
    shape = tuple(slices[name].get_shape())
    if slices[key].get_shape() != [shape[0]]:
        raise quantization.misfit(key, f"is not as long as the rows of {name}")
    parts = {"weight": slices[name], "rows": slices[key]}
    return Decoded(shape, dtype, parts, _by_rows)


def _by_rows(tensors: Parts) -> torch.Tensor:
    return tensors["weight"].float() * (tensors["rows"].float()[:, None] / 127)
