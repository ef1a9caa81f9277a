"""What the bytes of a tile mean, by the letter of layout.py's drawing, one weight at a time."""

import struct

import numpy as np
import torch

from moestro.engine.kernels import TileFormat

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMPY = {"float32": ("<f4", 4), "float16": ("<f2", 2)}


def decode(stored: torch.Tensor, form: TileFormat, outputs: int, inputs: int) -> torch.Tensor:
    """uint8 [T, tile_bytes] -> fp32 [N, K]."""
    found = np.zeros((len(stored) * 16, form.padded(inputs)), np.float32)
    for number, tile in enumerate(stored.numpy()):
        found[16 * number : 16 * number + 16] = _tile(tile.tobytes(), form, inputs)
    return torch.from_numpy(found[:outputs, :inputs].copy())


def _numbers(data: bytes, kind: str) -> np.ndarray:
    """16 of them, or as many as there are bytes for."""
    if kind == "bfloat16":
        words = np.frombuffer(data, "<u2").astype("<u4") << 16
        return words.view("<f4").astype(np.float32)
    return np.frombuffer(data, NUMPY[kind][0]).astype(np.float32)


def _e4m3(byte: int) -> float:
    sign, exponent, fraction = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def _tile(data: bytes, form: TileFormat, inputs: int) -> np.ndarray:
    padded, group = form.padded(inputs), form.group_of(inputs)
    out, at = np.zeros((16, padded), np.float32), 0
    if form.kind in ("float32", "bfloat16", "float16"):
        each = 4 if form.kind == "float32" else 2
        for k in range(0, padded, 4 // each):
            line = data[at : at + 64]
            for row in range(16):
                out[row, k : k + 4 // each] = _numbers(line[4 * row : 4 * row + 4], form.kind)
            at += 64
        return out
    size = 4 if form.scale == "float32" else 2
    step = 8 if form.kind in ("int4", "mxfp4") else 4
    for start in range(0, padded, group):
        codes = np.zeros((16, group), np.int64)
        for k in range(0, group, step):
            for row in range(16):
                four = struct.unpack("4B", data[at + 4 * row : at + 4 * row + 4])
                codes[row, k : k + 4] = [b & 15 for b in four] if step == 8 else four
                if step == 8:
                    codes[row, k + 4 : k + 8] = [b >> 4 for b in four]
            at += 64
        part = slice(start, start + group)
        if form.kind == "mxfp4":
            exponents = np.frombuffer(data[at : at + 16], np.uint8).astype(np.float64)
            at += 16
            values = np.array([*E2M1, *(-value for value in E2M1)])[codes]
            out[:, part] = values * 2.0 ** (exponents[:, None] - 127)
            continue
        scales = _numbers(data[at : at + 16 * size], form.scale)[:, None]
        at += 16 * size
        if form.kind == "int8":
            out[:, part] = (codes - 128) * scales
        elif form.kind == "fp8":
            out[:, part] = np.vectorize(_e4m3)(codes) * scales
        elif form.zero == "none":
            out[:, part] = scales * (codes - 8)
        elif form.zero == "integer":
            zeros = np.frombuffer(data[at : at + 16], np.uint8).astype(np.int64)
            out[:, part] = scales * (codes - zeros[:, None])
            at += 16
        else:
            out[:, part] = scales * codes + _numbers(data[at : at + 16 * size], form.scale)[:, None]
            at += 16 * size
    assert at == len(data)
    return out
