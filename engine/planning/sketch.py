"""A checkpoint of which only the config is here, and maybe the index: shapes without weights.

For planning before anything large is fetched. The shapes are those of the model's own class on the
meta device, so its tensors have the names of the model, not those of the files.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moestro.engine.facts import ModelNotFound, ModelRefused
from moestro.engine.formats import ExpertsModule, is_experts_module
from moestro.engine.weights import (
    INDEX_NAME,
    PLAIN_DTYPES,
    Checkpoint,
    RouterFacts,
    json_object,
    read_config,
    read_quantization,
    said_form,
    weight_files,
)

PLAIN_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
WIDE_BYTES = 3  # per number and more on average: the index speaks of fp32


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What somebody knows of weight files that are not here, beside the config and the index.

    `dtype_name` is safetensors' word (F16). Tensors with one of `wide` in their names are F32.
    """

    total_bytes: int | None = None
    dtype_name: str | None = None
    wide: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the header of a file would say about one tensor."""

    dtype_name: str
    shape: tuple[int, ...]
    grid: object  # as Checkpoint.grid_form gives it

    def get_dtype(self) -> str:
        return self.dtype_name

    def get_shape(self) -> list[int]:
        return list(self.shape)


def weights_are_here(folder: Path) -> bool:
    """Whether every weight file is: those that the index names, or any where there is no index.

    Raises ModelRefused for files that are here but not carried.
    """
    names = _names_in_index(folder)
    if names:
        return all((folder / name).is_file() for name in names)
    try:
        return bool(weight_files(folder))
    except ModelNotFound:
        return False


class Sketch(Checkpoint):
    """Answers about shapes and dtypes like a Checkpoint; has nothing to load.

    Raises ModelNotFound or ModelRefused as a Checkpoint does.
    """

    def __init__(self, folder: Path, stored: StoredWeights | None = None) -> None:
        self.folder = folder
        self._stored = stored or StoredWeights()
        self.config = read_config(folder)
        self.routers = RouterFacts.of(folder)
        self._said_dtype = getattr(self.config, "dtype", None)  # building a model sets it
        self._file_of_key = {}
        self._slices = {}
        self._untied = set()
        self.quantization = read_quantization(folder)

    def split_keys(self, model: PreTrainedModel) -> tuple[list[ExpertsModule], list[str]]:
        """Like a Checkpoint's, with the model's own names."""
        tensors: dict[str, torch.Tensor] = {}
        tensors |= dict(model.named_parameters())  # tied ones once, as the files have them
        kept = model.state_dict()
        tensors |= {name: found for name, found in model.named_buffers() if name in kept}
        numbers = sum(tensor.numel() for tensor in tensors.values())
        dtype_name = self._stored.dtype_name or self._stored_dtype(numbers)
        wide = PLAIN_NAMES[torch.float32]
        said = str(self._said_dtype or torch.bfloat16).removeprefix("torch.")
        grid = "" if self.quantization is None else said_form(self.quantization, said)
        self._slices = {
            name: _Shape(
                wide if any(part in name for part in self._stored.wide) else dtype_name,
                tuple(tensor.shape),
                grid,
            )
            for name, tensor in tensors.items()
        }
        modules = [
            self._experts_module(
                model, path, {f"{path}.{name}": [f"{path}.{name}"] for name in names}
            )
            for path, names in _experts_names(model)
        ]
        taken = {key for entry in modules for key in entry.source_keys}
        return modules, [name for name in tensors if name not in taken]

    def _stored_dtype(self, numbers: int) -> str:
        """The config's dtype, unless the bytes in the index contradict; fp32 if nobody says."""
        said = self._said_dtype
        dtype = getattr(torch, said, None) if isinstance(said, str) else said
        total_bytes = _total_bytes_in_index(self.folder) or self._stored.total_bytes
        if total_bytes:
            itemsize = 4 if total_bytes / numbers > WIDE_BYTES else 2
            if dtype is None or dtype.itemsize != itemsize:
                dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        if dtype is not None and dtype not in PLAIN_NAMES:
            raise ModelRefused(f"{self.folder}: weights in {dtype} are not carried")
        return PLAIN_NAMES[dtype or torch.float32]


def _experts_names(model: PreTrainedModel) -> list[tuple[str, list[str]]]:
    return [
        (path, [name for name, _ in module.named_parameters(recurse=False)])
        for path, module in model.named_modules()
        if is_experts_module(module)
    ]


def _names_in_index(folder: Path) -> set[str]:
    weight_map = json_object(folder / INDEX_NAME, "a weight index").get("weight_map")
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()


def _total_bytes_in_index(folder: Path) -> float:
    metadata = json_object(folder / INDEX_NAME, "a weight index").get("metadata")
    found = metadata.get("total_size") if isinstance(metadata, dict) else None
    return float(found) if isinstance(found, int | float) else 0.0
