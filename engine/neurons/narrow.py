"""Linear layers with some of their outputs, or some of their inputs, copied: in blocks of 16.

What is copied is stored as in the whole layer, in its format and with its scales: no number
changes.

Shape letters: N outputs, K inputs, b blocks that are kept.
"""

from collections.abc import Sequence
from math import prod

import torch

from moestro.engine.kernels import BLOCK, CUT, keep_inputs, keep_outputs
from moestro.engine.weights import CompactLinear, Int8Weights, Sides, TileLinear

Linear = torch.nn.Linear | TileLinear | CompactLinear


def is_linear(module: torch.nn.Module) -> bool:
    """Of a kind, and in a format, that can be copied in blocks; its weights are there.

    Modules that a text pass never runs have none.
    """
    if isinstance(module, TileLinear):
        return module.form.kind in CUT
    if isinstance(module, CompactLinear):
        return isinstance(module.weights, Int8Weights)
    weight = module._parameters.get("weight")
    return type(module) is torch.nn.Linear and weight is not None and not weight.is_meta


def linear_at(module: torch.nn.Module, path: str) -> Linear:
    """One for which `is_linear` holds."""
    found = module.get_submodule(path)
    assert isinstance(found, torch.nn.Linear | TileLinear | CompactLinear)
    return found


def device_of(linear: Linear) -> torch.device:
    if isinstance(linear, TileLinear):
        return linear.tiles.device
    if isinstance(linear, CompactLinear):
        return linear.weights.tensors()[Int8Weights.parts[0]].device
    return linear.weight.device


def with_outputs(linear: Linear, blocks: Sequence[int]) -> Linear:
    """[N, K] -> [16 b, K], the blocks in this order."""
    old = linear.bias if isinstance(linear, torch.nn.Linear) else linear.bias_row
    bias = None if old is None else old.index_select(0, _neurons(blocks, old.device))
    sides = Sides(BLOCK * len(blocks), linear.in_features, bias)
    if isinstance(linear, TileLinear):
        return TileLinear(sides, keep_outputs(linear.tiles, blocks), linear.form, linear.scratch)
    if isinstance(linear, CompactLinear):
        weights = linear.weights
        assert isinstance(weights, Int8Weights)
        rows = _neurons(blocks, weights.values.device)
        kept = (each.index_select(0, rows) for each in (weights.values, weights.scale))
        return CompactLinear(sides, Int8Weights(*kept), None)
    rows = _neurons(blocks, linear.weight.device)
    return _plain(linear.weight.index_select(0, rows), bias)


def with_inputs(linear: Linear, blocks: Sequence[int]) -> Linear:
    """[N, K] -> [N, 16 b], the blocks in this order; scales and biases are the whole layer's."""
    bias = linear.bias if isinstance(linear, torch.nn.Linear) else linear.bias_row
    sides = Sides(linear.out_features, BLOCK * len(blocks), bias)
    if isinstance(linear, TileLinear):
        tiles = keep_inputs(linear.tiles, linear.form, linear.in_features, blocks)
        return TileLinear(sides, tiles, linear.form, linear.scratch)
    if isinstance(linear, CompactLinear):
        weights = linear.weights
        assert isinstance(weights, Int8Weights)
        columns = _neurons(blocks, weights.values.device)
        values = weights.values.index_select(1, columns)
        return CompactLinear(sides, Int8Weights(values, weights.scale), None)
    columns = _neurons(blocks, linear.weight.device)
    return _plain(linear.weight.index_select(1, columns), bias)


def outputs_bytes(linear: Linear, blocks: int) -> int:
    """Of what `with_outputs` copies with so many blocks."""
    outputs = BLOCK * blocks
    if isinstance(linear, TileLinear):
        weights = prod(linear.form.shape(outputs, linear.in_features))
    elif isinstance(linear, CompactLinear):
        weights = outputs * (linear.in_features + 4)
    else:
        weights = outputs * linear.in_features * linear.weight.itemsize
    bias = linear.bias if isinstance(linear, torch.nn.Linear) else linear.bias_row
    return weights + (0 if bias is None else outputs * bias.itemsize)


def inputs_bytes(linear: Linear, blocks: int) -> int:
    """Of what `with_inputs` copies with so many blocks."""
    inputs = BLOCK * blocks
    if isinstance(linear, TileLinear):
        return prod(linear.form.shape(linear.out_features, inputs))
    each = 1 if isinstance(linear, CompactLinear) else linear.weight.itemsize
    return linear.out_features * inputs * each


def _neurons(blocks: Sequence[int], device: torch.device) -> torch.Tensor:
    firsts = BLOCK * torch.tensor(blocks, dtype=torch.int64)
    return (firsts[:, None] + torch.arange(BLOCK)).flatten().to(device)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    outputs, inputs = weight.shape
    made = torch.nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = torch.nn.Parameter(bias, requires_grad=False)
    return made
