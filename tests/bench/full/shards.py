"""Safetensors written one tensor after the other, so that a shard never lies in memory."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from .geometry import BF16_BYTES, Shapes

Fill = Callable[[str, tuple[int, ...]], torch.Tensor]
ALIGN_BYTES = 64
INDEX_NAME = "model.safetensors.index.json"


def write_shard(path: Path, shapes: Shapes, fill: Fill) -> None:
    """`fill` gives each tensor, bf16, when its turn comes. A file that is there is whole."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(header(shapes))
        for name, shape in shapes.items():
            tensor = fill(name, shape)
            if tensor.shape != shape or tensor.dtype != torch.bfloat16:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not bf16 {shape}")
            tensor.contiguous().view(torch.uint8).numpy().tofile(file)
    part.replace(path)


def header(shapes: Shapes) -> bytes:
    """Eight bytes of length, then JSON, padded so that the data begins aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + BF16_BYTES * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


def write_index(path: Path, files: dict[str, Shapes]) -> None:
    """Which shard holds which tensor."""
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    total = BF16_BYTES * sum(prod(s) for shapes in files.values() for s in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index), "utf-8")
