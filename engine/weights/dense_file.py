"""The finished dense part, kept beside the pack: what the first start made, every bit of it.

The next start reads it into place, fewer bytes than the checkpoint's, and converts and encodes
nothing. Only compact formats are kept: native weights are no smaller than the checkpoint itself. A
file that is missing, foreign or damaged costs that start the time to make it anew; one that cannot
be written costs the next start that.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from moestro.cache import (
    PackInvalid,
    PackUnwritable,
    holds_tensors,
    human_bytes,
    read_tensors,
    write_tensors,
)
from moestro.engine.kernels import ROWS, TILE16

from .checkpoint import Checkpoint, drop_experts
from .dense import Replacement, put_module
from .linears import CompactLinear, Int8Weights, Shared, StoredEmbedding, TileLinear

log = logging.getLogger("moestro.engine")


@dataclass(frozen=True, slots=True)
class DenseFile:
    """`key` names all that its bytes depend on: a file with another one is of no use."""

    path: Path
    key: str

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, dense_format: str, folder: Path, *, tiled: bool
    ) -> "DenseFile | None":
        """None for the format that is not kept. `tiled`: as `replacements` has it."""
        if dense_format == "native":
            return None
        parts = (
            checkpoint.fingerprint(),
            dense_format,
            f"moestro {version('moestro')}",
            f"transformers {transformers.__version__}",
            f"torch {torch.__version__}",
            f"matrices in {TILE16 if tiled else ROWS}",
        )
        return cls(folder / f"dense.{dense_format}", ", ".join(parts))

    def is_kept(self) -> bool:
        """Whether an earlier start has written it, for this very key."""
        return holds_tensors(self.path, self.key)

    def restore(
        self,
        model: PreTrainedModel,
        found: Sequence[Replacement],
        shared: Shared,
    ) -> bool:
        """Give `model` (on meta) its dense weights. False: neither it nor the file is of use."""
        try:
            source = _Source(self.path, self.key)
            drop_experts(model)
            _fill(model, source, found, shared)
        except PackInvalid as error:
            log.warning("the dense weights are made anew: %s", error)
            return False
        log.info("dense weights: as the first start made them, from %s", self.path)
        return True

    def keep(self, model: PreTrainedModel, report: Callable[[int, int], None]) -> None:
        """Write what `model` has; where that fails, the log says so and nothing else changes."""
        try:
            if write_tensors(self.path, self.key, dict(_dense_tensors(model)), report):
                size = human_bytes(self.path.stat().st_size)
                log.info("dense weights: kept for the next start, %s in %s", size, self.path)
        except PackUnwritable as error:
            log.warning(
                "the next start will take longer, the dense weights are not kept: %s", error
            )


def _dense_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that its modules hold, by name; one tensor under two names where it is tied."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}", tensor
        if isinstance(module, CompactLinear):
            for name, tensor in module.weights.tensors().items():
                yield f"{path}.{name}", tensor
            if module.bias_row is not None:
                yield f"{path}.bias", module.bias_row
        elif isinstance(module, TileLinear):
            yield f"{path}.tiles", module.tiles
            if module.bias_row is not None:
                yield f"{path}.bias", module.bias_row
        elif isinstance(module, StoredEmbedding):
            yield f"{path}.rows", module.rows


class _Source:
    """The tensors of a file, each taken once."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._left = read_tensors(path, key)
        self._parameters: dict[int, torch.nn.Parameter] = {}

    def take(self, name: str, shape: torch.Size | None = None) -> torch.Tensor:
        tensor = self._left.pop(name, None)
        if tensor is None or shape not in (None, tensor.shape):
            raise PackInvalid(f"{self._path} does not fit the model: {name}")
        return tensor

    def parameter(self, name: str, like: torch.nn.Parameter) -> torch.nn.Parameter:
        """The same one for names that are tied."""
        tensor = self.take(name, like.shape)
        fresh = torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
        return self._parameters.setdefault(id(tensor), fresh)

    def check_empty(self) -> None:
        if self._left:
            raise PackInvalid(f"{self._path} does not fit the model: {next(iter(self._left))}")


def _fill(
    model: PreTrainedModel, source: _Source, found: Sequence[Replacement], shared: Shared
) -> None:
    for each in found:
        put_module(model, each.path, _compact(model.get_submodule(each.path), each, source, shared))
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = source.parameter(f"{path}.{name}", parameter)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = source.take(f"{path}.{name}", buffer.shape)
    source.check_empty()


def _compact(
    old: torch.nn.Module, what: Replacement, source: _Source, shared: Shared
) -> torch.nn.Module:
    if isinstance(old, torch.nn.Embedding):
        return StoredEmbedding(source.take(f"{what.path}.rows", old.weight.shape), old.weight.dtype)
    assert isinstance(old, torch.nn.Linear)
    if old.bias is not None:
        old.bias = source.parameter(f"{what.path}.bias", old.bias)
    if what.form is not None:
        shape = torch.Size(what.form.shape(old.out_features, old.in_features))
        tiles = source.take(f"{what.path}.tiles", shape)
        return TileLinear(old, tiles, what.form, shared.scratch)
    parts = [source.take(f"{what.path}.{part}") for part in Int8Weights.parts]
    return CompactLinear(old, Int8Weights(*parts), shared.last)
