"""The dense part: loaded layer by layer, and with `--dense-format int8` one byte per weight.

Where the library computes, linear layers of the model become `TileLinear`: with `native` in the
checkpoint's own dtype if that is a small one, widened as it is read, which loses nothing. Where
torch does, they become `CompactLinear`, or stay what they are with `native`. Norms, routers and
everything that is not a linear layer stay in the compute dtype. A head that is tied to the
embedding gets weights of its own (the embedding is looked up, not multiplied). An embedding that
nothing multiplies with keeps the checkpoint's dtype.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moestro.engine.formats import tile_format
from moestro.engine.kernels import TileFormat

from .checkpoint import Checkpoint
from .linears import (
    CompactLinear,
    HostEmbedding,
    Int8Weights,
    Shared,
    StoredEmbedding,
    TileLinear,
)

DENSE_FORMATS = ("native", "int8")
ON_HOST = "host"  # the kind of an embedding that takes no memory where the model computes


@dataclass(frozen=True, slots=True)
class Replacement:
    """What becomes of one module when its weights are there."""

    path: str
    kind: str  # "int8", the dtype that it is stored in, or ON_HOST
    bytes: int  # that it will take
    numbers: int
    form: TileFormat | None = None  # of a linear layer in tiles


def replacements(
    model: PreTrainedModel,
    stock_paths: Iterable[str],
    dense_format: str,
    checkpoint: Checkpoint,
    *,
    tiled: bool,
) -> list[Replacement]:
    """Which modules of `model` (on meta) are kept in fewer bytes than its own dtype takes.

    Not those below `stock_paths`: routers, where one bit picks another expert, and layers whose
    weights other modules read. `tiled`: linear layers lie in tiles, for the library's products.
    """
    stock = tuple(f"{path}." for path in stock_paths)
    ties = getattr(model, "all_tied_weights_keys", {})
    found = []
    for path, module in model.named_modules():
        key = f"{path}.weight"
        if f"{path}.".startswith(stock) or module._parameters.get("weight") is None:
            continue
        if type(module) is torch.nn.Linear:
            stored = checkpoint.stored_dtype(key) or checkpoint.stored_dtype(ties.get(key, key))
            if tiled:
                found.append(_in_tiles(path, module, dense_format, stored))
            elif not tiled and dense_format != "native":
                count = module.weight.numel()
                found.append(Replacement(path, "int8", count + 4 * module.out_features, count))
        elif type(module) is torch.nn.Embedding:
            stored, count = checkpoint.stored_dtype(key), module.weight.numel()
            shared = bool(ties) and dense_format == "native" and not tiled
            if stored is not None and _is_smaller(stored, module) and not shared:
                kind = str(stored).removeprefix("torch.")
                found.append(Replacement(path, kind, stored.itemsize * count, count))
    return found


def _is_smaller(stored: torch.dtype | None, module: torch.nn.Linear | torch.nn.Embedding) -> bool:
    """In a checkpoint's dtype than in the module's own; where it has weights there."""
    return stored is not None and stored.itemsize < module.weight.dtype.itemsize


def _in_tiles(
    path: str, linear: torch.nn.Linear, name: str, stored: torch.dtype | None
) -> Replacement:
    """`name` as the flag has it; `native` is the dtype that is `stored`."""
    dtype = linear.weight.dtype if stored is None else stored
    form = tile_format(name, dtype, linear.in_features)
    tiles, tile_bytes = form.shape(linear.out_features, linear.in_features)
    return Replacement(path, form.kind, tiles * tile_bytes, linear.weight.numel(), form)


def saved_bytes(model: PreTrainedModel, found: Iterable[Replacement], itemsize_bytes: int) -> int:
    """What `found` take less than `itemsize_bytes` per number would.

    A tied head takes more, not less: its weights are in memory once more.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return sum(
        (0 if f"{each.path}.weight" in tied else itemsize_bytes * each.numbers) - each.bytes
        for each in found
    )


def kept_on_host(model: PreTrainedModel) -> list[Replacement]:
    """The input embedding of `model` (on meta), where nothing else reads its weights."""
    embedding = model.get_input_embeddings()
    ties = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties, *ties.values()}
    return [
        Replacement(path, ON_HOST, 0, module.weight.numel())
        for path, module in model.named_modules()
        if module is embedding
        and type(module) is torch.nn.Embedding
        and f"{path}.weight" not in tied
    ]


def load_dense(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    keys: list[str],
    found: Iterable[Replacement],
    shared: Shared,
    report: Callable[[int, int], None],
    device: torch.device = torch.device("cpu"),  # noqa: B008  # a value like any other
) -> None:
    """Give `model` its dense weights, and replace the modules of `found` as soon as they have them.

    Only the layer that is being loaded is in memory in two forms.
    """
    left = {each.path: each for each in found}
    # Until the end one of two tied modules takes its weights from the other, whichever has them.
    ties = getattr(model, "all_tied_weights_keys", {})
    tied = {*ties, *ties.values()}

    def after_group(done: int, total: int) -> None:
        ready = [path for path in left if _is_loaded(model, path) and f"{path}.weight" not in tied]
        for path in ready:
            _replace(model, left.pop(path), shared)
        report(done, total)

    checkpoint.load_dense(model, keys, after_group, device)
    for each in left.values():  # tied to another tensor: it has its weights only now
        _replace(model, each, shared)


def _is_loaded(model: PreTrainedModel, path: str) -> bool:
    return all(not parameter.is_meta for parameter in model.get_submodule(path).parameters())


def _replace(model: PreTrainedModel, what: Replacement, shared: Shared) -> None:
    old = model.get_submodule(what.path)
    new: torch.nn.Module
    if what.kind == ON_HOST:
        assert isinstance(old, torch.nn.Embedding)
        new = HostEmbedding(old.weight.detach())
    elif isinstance(old, torch.nn.Embedding):
        rows = old.weight.detach().to(getattr(torch, what.kind))
        new = StoredEmbedding(rows, old.weight.dtype)
    else:
        assert isinstance(old, torch.nn.Linear)
        if what.form is not None:
            new = TileLinear.encode(old, what.form, shared.scratch)
        else:
            new = CompactLinear(old, Int8Weights.encode(old.weight.detach()), shared.last)
    put_module(model, what.path, new)


def put_module(model: PreTrainedModel, path: str, new: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
