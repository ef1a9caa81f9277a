"""A folder with a dense model: what it is, whether it has an exact twin, its tensors."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from moestro.engine import StartError, read_config, read_quantization
from moestro.factorize.facts import SourceRefused
from moestro.factorize.families import FAMILIES, Family, Parts, obstacles

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class DenseModel:
    """Facts of a dense model that the split can carry exactly."""

    folder: Path
    config: Any  # of one of FAMILIES
    files: dict[str, Path]  # tensor name -> the file that has it
    dtype: torch.dtype

    @property
    def neurons(self) -> int:
        return int(self.config.intermediate_size)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @classmethod
    def open(cls, folder: Path) -> "DenseModel":
        """Raises SourceRefused and names what stands against an exact twin."""
        try:
            config = read_config(folder)
            quantized = read_quantization(folder) is not None
        except StartError as error:
            raise SourceRefused(f"the model is not readable: {error}") from error
        if quantized:
            raise SourceRefused(f"{folder} is quantized; give the unquantized model")
        for reason in obstacles(config):
            raise SourceRefused(f"{folder} cannot be factorized exactly: {reason}")
        files = tensor_files(folder)
        name = "model.layers.0.mlp.down_proj.weight"
        if name not in files:
            raise SourceRefused(f"{folder} has no tensor {name}")
        try:
            with safe_open(files[name], "pt") as file:
                dtype = file.get_tensor(name).dtype
        except (OSError, SafetensorError) as error:
            raise SourceRefused(f"{files[name]} is not readable: {error}") from error
        if dtype not in DTYPES.values():
            raise SourceRefused(f"{folder} has weights of {dtype}; give the unquantized model")
        return cls(folder, config, files, dtype)

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    @property
    def carried_dtype(self) -> torch.dtype:
        """Of the FFN's weights as the twin gets them: `dtype` where they are the source's own."""
        down = self._parts()["model.layers.0.mlp.down_proj.weight"]
        return torch.float32 if down.rounds else self.dtype

    @property
    def ffn_as_stored(self) -> bool:
        """Whether the twin's FFN has the stored tensors: gate, up and down, each by itself."""
        parts = self._parts()
        names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        return all(parts[n].sources == (n,) and not parts[n].rounds for n in names if n in parts)

    def _parts(self) -> Parts:
        return self.family.twin_parts(self.files, self.config)

    @property
    def source_bytes(self) -> int:
        """Of all its weight files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    @property
    def attention_weights(self) -> int:
        """Of one layer's four projections."""
        heads = int(self.config.num_attention_heads)
        return 2 * self.hidden * (heads * self._head_dim() + self.key_width)

    @property
    def key_width(self) -> int:
        """Of a token's keys in one layer, all heads together."""
        return int(self.config.num_key_value_heads) * self._head_dim()

    def _head_dim(self) -> int:
        own = getattr(self.config, "head_dim", None)
        return int(own or self.hidden // int(self.config.num_attention_heads))

    def tensors(self) -> "TensorReader":
        return TensorReader(self.files)

    def carried_tensors(self) -> "CarriedReader":
        """Under Llama's names and in Llama's form, whatever the family."""
        return CarriedReader(self.files, self._parts())

    def content_sha256(self) -> str:
        """Of names, types, shapes and bytes, whatever the files they are spread over."""
        digest = hashlib.sha256()
        with self.tensors() as tensors:
            for name in sorted(self.files):
                tensor = tensors.get(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class TensorReader:
    """Reads tensors by name; use it in a `with` block, which closes the files."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def get(self, name: str) -> torch.Tensor:
        """Raises SourceRefused."""
        path = self._files.get(name)
        if path is None:
            raise SourceRefused(f"the model has no tensor {name}")
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, "pt"))
            tensor: torch.Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SourceRefused(f"{path} is not readable: {error}") from error
        return tensor


class CarriedReader(TensorReader):
    """The tensors of a family by Llama's names."""

    def __init__(self, files: dict[str, Path], parts: Parts) -> None:
        super().__init__(files)
        self._parts = parts

    def names(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def get(self, name: str) -> torch.Tensor:
        """Raises SourceRefused."""
        part = self._parts.get(name)
        if part is None:
            raise SourceRefused(f"the model has no tensor {name}")
        return part.make([super(CarriedReader, self).get(source) for source in part.sources])

    def rounds(self, name: str) -> bool:
        """Whether the numbers are not the source's own, and a smaller type would change them."""
        return self._parts[name].rounds


def tensor_files(folder: Path) -> dict[str, Path]:
    """Raises SourceRefused when there are no safetensors or some are missing."""
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    try:
        if index.is_file():
            names = json.loads(index.read_text("utf-8"))["weight_map"]
            files = {name: folder / file for name, file in names.items()}
        elif single.is_file():
            with safe_open(single, "pt") as file:
                files = dict.fromkeys(file.keys(), single)
        else:
            raise SourceRefused(f"{folder} has no model.safetensors; other formats are not read")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise SourceRefused(f"the weights in {folder} are not readable: {error}") from error
    missing = sorted({path.name for path in files.values() if not path.is_file()})
    if missing:
        raise SourceRefused(f"{folder} lacks {', '.join(missing)}")
    # buffers of old checkpoints, recomputed by everybody
    return {name: path for name, path in files.items() if "rotary_emb.inv_freq" not in name}
