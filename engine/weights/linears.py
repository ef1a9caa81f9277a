"""What linear layers and embeddings become when they are kept in fewer bytes.

The tensors are plain attributes: they belong to no state dict and are never initialised.

Shape letters: N outputs, K inputs, n rows.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F

from moestro.cache import huge_memory
from moestro.engine.formats import (
    Fine,
    multiply_fine,
    quantize_fine,
    quantize_rows,
)
from moestro.engine.kernels import Scratch, TileFormat, TileMatrix, encode, linear, tile_matrix

ROWS_AT_ONCE = 128  # of a matrix, encoded together: their fp32 copies stay in the caches
BLOCK_ROWS = 128
"""Rows multiplied together: what lies between two operations stays in the caches."""


class Weights(Protocol):
    """One matrix in some format. `begin` prepares up to BLOCK_ROWS rows."""

    size_bytes: int
    parts: ClassVar[tuple[str, ...]]
    """Names of the tensors that its class is made of, in order."""

    def begin(self, rows: torch.Tensor) -> Any: ...

    def multiply(self, rows: Any) -> torch.Tensor:
        """[n, K], as `begin` made them, -> fp32 [n, N]."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its parts by name."""


class Int8Weights:
    """int8 rows [N, K], one scale each; the other side in two int8 digits."""

    parts: ClassVar[tuple[str, ...]] = ("values", "scale")

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        """int8 [N, K], fp32 [N]"""
        self.values, self.scale = values, scale
        self._transposed = values.t()
        self.size_bytes = values.nbytes + scale.nbytes

    @classmethod
    def encode(cls, weight: torch.Tensor) -> Self:
        values = torch.empty_like(weight, dtype=torch.int8)
        scale = torch.empty(weight.shape[0], device=weight.device)
        for start in range(0, weight.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            values[rows], row_scale = quantize_rows(weight[rows].float())
            scale[rows] = row_scale[:, 0]
        return cls(values, scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.parts, (self.values, self.scale), strict=True))

    def begin(self, rows: torch.Tensor) -> Fine:
        return quantize_fine(rows.float())

    def multiply(self, rows: Fine) -> torch.Tensor:
        return multiply_fine(rows, self._transposed, self.scale)


class LastRows:
    """The rows last prepared, for the next layer that reads the very same tensor (q, k and v do).

    Knows a tensor by its identity, so it is for models whose layers do not change an input that
    another one reads after them (`Topology.inputs_unchanged`).
    """

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._kind: type[Weights] | None = None
        self._blocks: list[Any] = []

    def blocks(self, rows: torch.Tensor, weights: Weights) -> list[Any]:
        """`rows` [..., K] in blocks, prepared for `weights`."""
        if self._of is None or self._of() is not rows or self._kind is not type(weights):
            flat = rows.reshape(-1, rows.shape[-1])
            self._blocks = [weights.begin(block) for block in torch.split(flat, BLOCK_ROWS)]
            self._of, self._kind = weakref.ref(rows), type(weights)
        return self._blocks


class Sides(NamedTuple):
    """Of a linear layer: all of it but its weights."""

    out_features: int
    in_features: int
    bias: torch.Tensor | None


class CompactLinear(torch.nn.Module):
    """y = x W^T + b with W in fewer bytes."""

    def __init__(
        self, linear: torch.nn.Linear | Sides, weights: Weights, last: LastRows | None
    ) -> None:
        """Without `last`, every call prepares its rows itself."""
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.weights = weights
        self.bias_row = None if linear.bias is None else linear.bias.detach()
        self._last = last

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        last = LastRows() if self._last is None else self._last
        products = [self.weights.multiply(block) for block in last.blocks(rows, self.weights)]
        out = products[0] if len(products) == 1 else torch.cat(products)
        if self.bias_row is not None:
            out += self.bias_row
        return out.view(*rows.shape[:-1], self.out_features).to(rows.dtype)


LINE = 64  # bytes of a cache line, at which tiles begin
ROW_GROUP = 32
"""Inputs whose activations share a scale, with int8: a few very large ones coarsen only these."""


class TileLinear(torch.nn.Module):
    """The same with W in tiles, by the library's products."""

    def __init__(
        self,
        like: torch.nn.Linear | Sides,
        tiles: torch.Tensor,
        form: TileFormat,
        scratch: Scratch,
    ) -> None:
        """`tiles` uint8 [T, tile_bytes], as `form` says."""
        super().__init__()
        self.out_features, self.in_features = like.out_features, like.in_features
        self.form = form
        self.lie_in(tiles)
        self.bias_row = None if like.bias is None else like.bias.detach()
        self.scratch = scratch

    def lie_in(self, tiles: torch.Tensor) -> None:
        """The same bytes in other memory."""
        self.tiles = tiles
        self.matrix = tile_matrix(tiles, self.form, self.out_features, self.in_features, ROW_GROUP)

    @classmethod
    def encode(cls, like: torch.nn.Linear, form: TileFormat, scratch: Scratch) -> Self:
        return cls(like, encode(like.weight.detach(), form), form, scratch)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features).float().contiguous()
        out = linear(flat, self.matrix, self.bias_row, self.scratch)
        return out.view(*rows.shape[:-1], self.out_features).to(rows.dtype)


def beside(one: TileLinear, other: TileLinear) -> TileMatrix:
    """One matrix whose outputs are those of `one` and then of `other`, which lie in it from now on.

    Of the same format and inputs; the first one's outputs are whole tiles.
    """
    both = _joined(one.tiles, other.tiles)
    one.lie_in(both[: len(one.tiles)])
    other.lie_in(both[len(one.tiles) :])
    outputs = one.out_features + other.out_features
    return tile_matrix(both, one.form, outputs, one.in_features, ROW_GROUP)


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The tiles of both [T, tile_bytes]: where they lie one behind the other, as they lie."""
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if same and first.data_ptr() + first.nbytes == second.data_ptr():
        return first.as_strided((len(first) + len(second), first.shape[1]), first.stride())
    return torch.cat([first, second])


def settle(model: torch.nn.Module, moved: Callable[[], object]) -> None:
    """Moves the tiles of `model` into huge pages, one layer's behind the other, where the system

    has such lying free: a long stream of weights is read faster there. Only one layer's lie twice;
    `moved` is called when the old ones are free.
    """
    layers = [each for each in model.modules() if isinstance(each, TileLinear)]
    places = list(accumulate((-(-each.tiles.nbytes // LINE) * LINE for each in layers), initial=0))
    memory = huge_memory(max(LINE, places[-1]))
    if memory is None:
        return
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    for layer, start in zip(layers, places, strict=False):
        there = flat[start : start + layer.tiles.nbytes].view(layer.tiles.shape)
        layer.lie_in(there.copy_(layer.tiles))
        moved()


@dataclass(frozen=True, slots=True)
class Shared:
    """What the layers of one model share between their products."""

    last: LastRows | None
    scratch: Scratch


class StoredEmbedding(torch.nn.Module):
    """Looks rows up in the checkpoint's own dtype and widens those alone: no bit is lost."""

    def __init__(self, rows: torch.Tensor, widened: torch.dtype) -> None:
        """`widened` is what it hands out."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows.shape
        self.rows = rows
        self._dtype = widened

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.rows).to(self._dtype)


class HostEmbedding(torch.nn.Module):
    """A table that stays in the host's memory: the rows of a step are gathered there and sent.

    Of a model that computes on a device with memory of its own, where experts need the room.
    """

    def __init__(self, table: torch.Tensor) -> None:
        """Takes a copy of `table` to the host, where it is not there; rows go to where it was."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self._place = table.device
        self._table = table.cpu()  # no buffer: the model is where its other weights are

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(ids.cpu(), self._table)
        if self._place.type != "cuda":
            return rows.to(self._place)
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        return pinned.copy_(rows).to(self._place, non_blocking=True)


@contextmanager
def placeholders(model: torch.nn.Module) -> Iterator[None]:
    """Inside, what became of a module or stayed in the pack has tensors that count as initialized.

    Classes initialize children of theirs by name, and some of those are others now.
    """
    done = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    done._is_hf_initialized = True  # type: ignore[attr-defined]
    held: list[tuple[torch.nn.Module, str]] = []
    for module in model.modules():
        names = module.__dict__.get("moestro_dropped", ())
        if isinstance(module, CompactLinear | TileLinear | StoredEmbedding):
            names = ("weight",)
        held += [(module, name) for name in names]
    for module, name in held:
        module.__dict__[name] = done
    try:
        yield
    finally:
        for module, name in held:
            del module.__dict__[name]
