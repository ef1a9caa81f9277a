"""The dense part: loaded layer by layer, and with `--dense-format int8` one byte per weight.

Linear layers of the model become `Int8Linear`; embeddings, norms, routers and everything that is
not a linear layer stay in the compute dtype. A head that is tied to the embedding gets int8 weights
of its own (the embedding is looked up, not multiplied).
"""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, ExpertsModule
from .formats import multiply_fine, quantize_rows
from .topology import Topology

DENSE_FORMATS = ("native", "int8")
ROWS_AT_ONCE = 4096


class Int8Linear(torch.nn.Module):
    """y = x W^T + b with W as int8 rows [N, K], one scale each, and x in two int8 digits.

    The tensors are plain attributes: they belong to no state dict and are never initialised.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.values = torch.empty(linear.weight.shape, dtype=torch.int8)
        self.scale = torch.empty(linear.out_features)
        for start in range(0, linear.out_features, ROWS_AT_ONCE):  # a head has many rows
            rows = slice(start, start + ROWS_AT_ONCE)
            values, scale = quantize_rows(linear.weight.detach()[rows].float())
            self.values[rows], self.scale[rows] = values, scale[:, 0]
        self.bias_row = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out = multiply_fine(rows.reshape(-1, self.in_features), self.values, self.scale)
        if self.bias_row is not None:
            out += self.bias_row
        return out.view(*rows.shape[:-1], self.out_features).to(rows.dtype)


def quantized_paths(model: PreTrainedModel, topology: Topology) -> list[str]:
    """Linear layers that int8 may hold: all but the routers, where one bit picks another expert."""
    kept = [place.path for place in topology.routers if place is not None]
    return [
        path
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and not any(path == one or path.startswith(f"{one}.") for one in kept)
    ]


def saved_bytes(model: PreTrainedModel, paths: Iterable[str], itemsize_bytes: int) -> int:
    """What int8 weights at `paths` take less than `itemsize_bytes` per number would.

    A tied head takes more, not less: its weights are in memory once more.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    saved = 0
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, torch.nn.Linear)
        count = linear.weight.numel()
        kept = 0 if f"{path}.weight" in tied else itemsize_bytes * count
        saved += kept - count - 4 * linear.out_features
    return saved


def load_dense(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    keys: list[str],
    experts: list[ExpertsModule],
    quantized: list[str],
    report: Callable[[int, int], None],
) -> None:
    """Give `model` its dense weights; linear layers at the paths `quantized` become Int8Linear.

    Only the layer that is being loaded is in memory in two forms.
    """
    left = set(quantized)

    def after_group(done: int, total: int) -> None:
        ready = [path for path in left if _is_loaded(model, path)]
        for path in ready:
            _replace(model, path)
        left.difference_update(ready)
        report(done, total)

    checkpoint.load_dense(model, keys, experts, after_group)
    for path in left:  # tied to another tensor: it has its weights only now
        _replace(model, path)


def _is_loaded(model: PreTrainedModel, path: str) -> bool:
    return all(not parameter.is_meta for parameter in model.get_submodule(path).parameters())


def _replace(model: PreTrainedModel, path: str) -> None:
    linear = model.get_submodule(path)
    assert isinstance(linear, torch.nn.Linear)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Int8Linear(linear))
