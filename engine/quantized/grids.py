"""Which grid the numbers of a checkpoint lie on, by what its config says."""

from collections.abc import Mapping
from typing import Any

from .config import Quantization
from .slices import FP8, INT4, GridForm

ACT_ORDER = "its groups are not of neighbouring inputs (act-order)"
FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def form_by_config(quantization: Quantization, dtype_name: str) -> GridForm | str:
    """What the config alone says of its matrices, or why none of the kinds can keep them.

    `dtype_name` is the model's own. Raises ModelRefused.
    """
    match quantization.method:
        case "gptq":
            return gptq_form(quantization, "float16")
        case "awq":
            return GridForm(INT4, max(0, quantization.group_size()), "float16", "integer")
        case "fp8":
            block = quantization.fields.get("weight_block_size")
            return GridForm(FP8, block[1] if isinstance(block, list) else 0, "float32")
        case "compressed-tensors":
            return _compressed_form(quantization.fields, dtype_name)
    return f"numbers of {quantization.method} lie on no grid of {INT4} or {FP8}"


def gptq_form(quantization: Quantization, scale: str) -> GridForm | str:
    """Of matrices with scales of that dtype. Raises ModelRefused."""
    bits = quantization.whole("bits", (2, 4, 8))
    if bits != 4:
        return f"its numbers have {bits} bits"
    size = quantization.group_size()
    static = quantization.flag("static_groups", False)
    ordered = quantization.flag("desc_act", False) and not static and size != -1
    return GridForm(INT4, max(0, size), scale, "integer", ordered)


def _compressed_form(fields: Mapping[str, Any], dtype_name: str) -> GridForm | str:
    """Of its first group of weights: the others are often of layers that are no experts."""
    groups = fields.get("config_groups")
    each = groups.values() if isinstance(groups, dict) else ()
    said = [one["weights"] for one in each if isinstance(one, dict) and one.get("weights")]
    weights = said[0] if said and isinstance(said[0], dict) else {}
    if weights.get("type") == "float":
        block = weights.get("block_structure")
        return GridForm(FP8, block[1] if isinstance(block, list) else 0, "float32")
    if weights.get("num_bits") != 4:
        return f"its numbers have {weights.get('num_bits')} bits"
    if weights.get("actorder") in ("group", True):
        return ACT_ORDER
    group = weights.get("group_size")
    zero = "none" if weights.get("symmetric", True) else "integer"
    return GridForm(INT4, group if isinstance(group, int) and group > 0 else 0, dtype_name, zero)
