"""Quantized checkpoints made of plain ones by the formats' published formulas, in numpy.

Each maker turns one matrix into the tensors that a file of its format has, and into what they stand
for, in float32. None of it knows how moestro reads them.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Array = npt.NDArray[Any]
Made = tuple[dict[str, torch.Tensor], Array]  # by suffix of the matrix' name; the values
GROUP = 32
BLOCK = (32, 16)


@dataclass(frozen=True)
class Kind:
    """One format: its maker for a matrix [O, I] in float32, and its config's fields."""

    make: Callable[[Array], Made]
    fields: Mapping[str, Any]
    leaves: str = ".weight"  # which names are matrices of it
    kept: tuple[str, ...] = field(default=("gate.weight", "router", "embed_tokens", "lm_head"))


def packed(numbers: Array, bits: int) -> Array:
    """[n, m bits / 32] int32: numbers along the last dimension, the lowest bits first."""
    per = 32 // bits
    parts = numbers.astype(np.uint32).reshape(*numbers.shape[:-1], -1, per)
    words = np.zeros(parts.shape[:-1], dtype=np.uint32)
    for place in range(per):
        words |= parts[..., place] << np.uint32(bits * place)
    return words.view(np.int32)


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def asymmetric(groups: Array, bits: int) -> tuple[Array, Array, Array]:
    """(numbers, scales in float16, zeros) of the last dimension of [O, G, n]."""
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    most = (1 << bits) - 1
    scales = np.maximum((high - low) / most, 1e-6).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, most)
    numbers = np.rint(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    return np.clip(numbers, 0, most).astype(np.int64), scales, zeros.astype(np.int64)


def gptq(matrix: Array, bits: int = 4, reordered: bool = False, less: int = 1) -> Made:
    outputs, inputs = matrix.shape
    order = np.random.default_rng(3).permutation(inputs) if reordered else np.arange(inputs)
    numbers, scales, zeros = asymmetric(matrix[:, order].reshape(outputs, -1, GROUP), bits)
    values = (numbers - zeros[..., None]) * scales.astype(np.float32)[..., None]
    back = np.argsort(order)
    numbers, values = (x.reshape(outputs, inputs)[:, back] for x in (numbers, values))
    groups = (np.arange(inputs) // GROUP)[back]
    parts = {
        ".qweight": tensor(packed(numbers, bits).T),
        ".qzeros": tensor(packed(zeros.T - less, bits)),
        ".scales": tensor(scales.T),
        ".g_idx": tensor(groups.astype(np.int32)),
    }
    return parts, values.astype(np.float32)


def awq(matrix: Array) -> Made:
    outputs, inputs = matrix.shape
    numbers, scales, zeros = asymmetric(matrix.reshape(outputs, -1, GROUP), 4)
    values = (numbers - zeros[..., None]) * scales.astype(np.float32)[..., None]
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # output order[i] of eight lies in bits 4 i

    def words(columns: Array) -> torch.Tensor:
        return tensor(packed(columns.reshape(len(columns), -1, 8)[..., order], 4).squeeze(-1))

    parts = {
        ".qweight": words(numbers.reshape(outputs, inputs).T),
        ".qzeros": words(zeros.T),
        ".scales": tensor(scales.T),
    }
    return parts, values.reshape(outputs, inputs).astype(np.float32)


def float8(
    matrix: Array, block: tuple[int, int] | None = BLOCK, suffix: str = "_scale_inv"
) -> Made:
    rows, columns = block or matrix.shape
    outputs, inputs = matrix.shape
    scales = np.zeros((-(-outputs // rows), -(-inputs // columns)), dtype=np.float32)
    values, numbers = np.zeros_like(matrix), torch.zeros(matrix.shape, dtype=torch.float8_e4m3fn)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = (
                slice(row * rows, (row + 1) * rows),
                slice(column * columns, (column + 1) * columns),
            )
            scales[row, column] = scale = np.abs(matrix[place]).max() / 448
            numbers[place] = tensor(matrix[place] / scale).to(torch.float8_e4m3fn)
            values[place] = numbers[place].float().numpy() * scale
    return {".weight": numbers, f".weight{suffix}": tensor(scales)}, values


def bytes4(matrix: Array, nested: bool) -> Made:
    """bitsandbytes' own, which writes and reads it.

    Read as rows of one block: its kernel for CPUs takes the wrong scales for rows that are shorter.
    """
    import bitsandbytes.functional as functional

    packed_, state = functional.quantize_4bit(
        tensor(matrix), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    parts = {
        ".weight": packed_,
        **{f".weight.{n}": t for n, t in state.as_dict(packed=True).items()},
    }
    in_blocks = copy(state)
    in_blocks.shape = torch.Size((matrix.size // 64, 64))
    values = functional.dequantize_4bit(packed_, in_blocks).view(matrix.shape)
    return parts | {".weight": packed_}, values.float().numpy()


def bytes8(matrix: Array) -> Made:
    largest = np.abs(matrix).max(1).astype(np.float32)
    numbers = np.rint(matrix / largest[:, None] * 127).astype(np.int8)
    values = numbers.astype(np.float32) * (largest[:, None] / np.float32(127))
    parts = {".weight": tensor(numbers), ".SCB": tensor(largest)}
    return parts | {".weight_format": torch.tensor(0, dtype=torch.uint8)}, values


def pack_quantized(matrix: Array, zeros: bool = False, bits: int = 4) -> Made:
    outputs, inputs = matrix.shape
    half = 1 << (bits - 1)
    groups = matrix.reshape(outputs, -1, GROUP)
    if zeros:
        numbers, scales, zero = asymmetric(groups, bits)
    else:
        scales = (np.abs(groups).max(-1) / (half - 1)).astype(np.float16)
        numbers = np.rint(groups / scales.astype(np.float32)[..., None]).astype(np.int64) + half
        numbers, zero = np.clip(numbers, 0, 2 * half - 1), np.full(scales.shape, half)
    values = (numbers - zero[..., None]) * scales.astype(np.float32)[..., None]
    parts = {
        ".weight_packed": tensor(packed(numbers.reshape(outputs, inputs), bits)),
        ".weight_scale": tensor(scales),
        ".weight_shape": torch.tensor([outputs, inputs]),
    }
    if zeros:
        parts[".weight_zero_point"] = tensor(packed(zero.T, bits).T)
    return parts, values.reshape(outputs, inputs).astype(np.float32)


def int_quantized(matrix: Array) -> Made:
    scales = (np.abs(matrix).max(1, keepdims=True) / 127).astype(np.float32)
    numbers = np.rint(matrix / scales).astype(np.int8)
    return {".weight": tensor(numbers), ".weight_scale": tensor(scales)}, numbers * scales


def float_quantized(matrix: Array) -> Made:
    return float8(matrix, (1, matrix.shape[1]), "_scale")


def _groups(kind: str, bits: int, form: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, **more}
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
KINDS = {
    "fp8": Kind(float8, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "fp8 of one scale": Kind(lambda m: float8(m, None), {"quant_method": "fp8"}),
    "gptq": Kind(gptq, _GPTQ),
    "gptq reordered": Kind(lambda m: gptq(m, reordered=True), _GPTQ | {"desc_act": True}),
    "gptq v2, 8 bits": Kind(
        lambda m: gptq(m, bits=8, less=0), _GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}
    ),
    "awq": Kind(awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "nf4": Kind(lambda m: bytes4(m, nested=False), _BNB),
    "nf4 nested": Kind(lambda m: bytes4(m, nested=True), _BNB),
    "int8 of bitsandbytes": Kind(bytes8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "packed int4": Kind(
        pack_quantized, _groups("int", 4, "pack-quantized", group_size=GROUP, symmetric=True)
    ),
    "packed int4 with zeros": Kind(
        lambda m: pack_quantized(m, zeros=True),
        _groups("int", 4, "pack-quantized", group_size=GROUP, symmetric=False),
    ),
    "packed int8": Kind(lambda m: pack_quantized(m, bits=8), _groups("int", 8, "pack-quantized")),
    "int8 rows": Kind(int_quantized, _groups("int", 8, "int-quantized")),
    "fp8 rows": Kind(float_quantized, _groups("float", 8, "float-quantized")),
}


def write_quantized(plain: Path, out: Path, kind: Kind) -> Path:
    """The checkpoint `plain` with every linear layer in `kind`; `out`.plain has its values.

    Returns the latter. Both have the other files of `plain`.
    """
    twin = out.with_name(out.name + ".plain")
    for folder in (out, twin):
        shutil.copytree(plain, folder)
    stored, whole = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for key, weight in load_file(plain / "model.safetensors").items():
        matrix = weight.dim() == 2 and key.endswith(kind.leaves)
        matrix = matrix and weight.shape[0] % 8 == 0 and weight.shape[1] % GROUP == 0
        if not matrix or any(word in key for word in kind.kept) or "norm" in key:
            stored[key] = whole[key] = weight
            continue
        parts, values = kind.make(weight.float().numpy().astype(np.float32))
        name = key.removesuffix(".weight")
        stored |= {f"{name}{suffix}": part.contiguous() for suffix, part in parts.items()}
        whole[key] = tensor(values)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    save_file(whole, twin / "model.safetensors", {"format": "pt"})
    edit_config(out, quantization_config=dict(kind.fields))
    return twin


def mxfp4_files(folder: Path) -> dict[str, torch.Tensor]:
    """Its experts drawn anew as gpt-oss has them: blocks of 16 bytes and exponents.

    Returns all tensors with what these stand for.
    """
    draw = torch.Generator().manual_seed(2)
    weights = load_file(folder / "model.safetensors")
    plain = dict(weights)
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(256, (*shape, 16), generator=draw).to(torch.uint8)
        scales = torch.randint(120, 126, shape, generator=draw).to(torch.uint8)
        weights |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        plain[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    return plain


def write_mxfp4(plain: Path, out: Path) -> Path:
    """The checkpoint `plain` with experts in MXFP4; returns `out`.plain, which has their values."""
    twin = out.with_name(out.name + ".plain")
    for folder in (out, twin):
        shutil.copytree(plain, folder)
    save_file(mxfp4_files(out), twin / "model.safetensors", {"format": "pt"})
    return twin


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
