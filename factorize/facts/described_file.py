"""Tensors with facts about them, in one safetensors file."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]


def read_described(path: Path, key: str) -> tuple[dict[str, Any], Tensors]:
    """The JSON object that the metadata has under `key`, and all tensors.

    Raises OSError, SafetensorError, ValueError, KeyError, TypeError or RecursionError for a file
    that is none.
    """
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[key])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not isinstance(facts, dict):
        raise TypeError("its facts are no JSON object")
    return facts, tensors


def replace_file(path: Path, content: bytes) -> None:
    """Whole or not at all: what has the file that was there open, or mapped, keeps that.

    Raises OSError.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
