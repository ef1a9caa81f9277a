"""A folder of finished intermediate results, each a safetensors file with its checksum inside.

Knows names and tensors, not what they mean. A file is there whole, or not at all.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import FactorizeError

CHECKSUM_KEY = "moestro.sha256"

Tensors = dict[str, torch.Tensor]


def tensors_sha256(tensors: Tensors) -> str:
    """Of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def key_of(*facts: object) -> str:
    """A name for results that depend on exactly these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class WorkFolder:
    """Results under names. Two processes may share it: both write the same bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def inside(self, name: str) -> "WorkFolder":
        return WorkFolder(self.folder / name)

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def put(self, name: str, tensors: Tensors) -> None:
        """Raises FactorizeError when the disk does not take it."""
        path = self._path(name)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()},
                aside,
                {CHECKSUM_KEY: tensors_sha256(tensors)},
            )
            aside.replace(path)
        except (OSError, SafetensorError) as error:
            raise FactorizeError(f"could not write into {path.parent}: {error}") from error
        finally:
            aside.unlink(missing_ok=True)

    def get(self, name: str) -> Tensors:
        """Raises FactorizeError when the file is not as it was written."""
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FactorizeError(f"{path} is not readable: {error}; {self._remedy()}") from error
        if metadata.get(CHECKSUM_KEY) != tensors_sha256(tensors):
            raise FactorizeError(f"{path} has another checksum than when written; {self._remedy()}")
        return tensors

    def _remedy(self) -> str:
        return f"remove {self.folder} and run again"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
