"""A linear layer with some of its outputs or inputs, whatever its kind and format."""

from collections.abc import Callable

import pytest
import torch

from moestro.engine.formats import tile_format
from moestro.engine.kernels import BLOCK, Scratch, TileFormat
from moestro.engine.neurons.mlp import Mlp
from moestro.engine.neurons.narrow import (
    Linear,
    inputs_bytes,
    is_linear,
    outputs_bytes,
    with_inputs,
    with_outputs,
)
from moestro.engine.weights import CompactLinear, Int8Weights, TileLinear

KEPT = [0, 3, 4]  # of 5 blocks: an odd number of an odd number, which int8 pads


def plain(linear: torch.nn.Linear) -> Linear:
    return linear


def compact(linear: torch.nn.Linear) -> Linear:
    return CompactLinear(linear, Int8Weights.encode(linear.weight.detach()), None)


def tiles(name: str, dtype: torch.dtype = torch.float32) -> Callable[[torch.nn.Linear], Linear]:
    def made(linear: torch.nn.Linear) -> Linear:
        form = tile_format(name, dtype, linear.in_features)
        return TileLinear.encode(linear, form, Scratch())

    return made


KINDS = {
    "plain": (plain, 1e-6),
    "compact int8": (compact, 1e-4),
    "tiles float32": (tiles("native"), 1e-6),
    "tiles bfloat16": (tiles("native", torch.bfloat16), 1e-6),
    "tiles float16": (tiles("native", torch.float16), 1e-6),
    "tiles int8": (tiles("int8"), 1e-2),  # other inputs share a scale with a row's activations
}
KIND = pytest.mark.parametrize("kind", list(KINDS))


def layer(kind: str, outputs: int, inputs: int, bias: bool) -> Linear:
    torch.manual_seed(outputs)
    with torch.inference_mode():
        return KINDS[kind][0](torch.nn.Linear(inputs, outputs, bias=bias))


def rows_of(width: int) -> torch.Tensor:
    return torch.randn((3, width), generator=torch.Generator().manual_seed(1))


def kept_neurons() -> list[int]:
    return [BLOCK * block + place for block in KEPT for place in range(BLOCK)]


def tensors_of(linear: Linear) -> list[torch.Tensor]:
    if isinstance(linear, TileLinear):
        own, bias = [linear.tiles], linear.bias_row
    elif isinstance(linear, CompactLinear):
        own, bias = list(linear.weights.tensors().values()), linear.bias_row
    else:
        own, bias = [linear.weight], linear.bias
    return own if bias is None else [*own, bias]


def bytes_of(narrow: Linear, whole: Linear) -> int:
    """Of the narrow one's tensors, but those that are the whole one's."""
    shared = {each.data_ptr() for each in tensors_of(whole)}
    return sum(each.nbytes for each in tensors_of(narrow) if each.data_ptr() not in shared)


@KIND
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_some_outputs_are_the_whole_ones_to_the_bit(kind: str, bias: bool) -> None:
    whole, rows = layer(kind, 80, 96, bias), rows_of(96)
    narrow = with_outputs(whole, KEPT)
    wanted = whole(rows)[:, kept_neurons()]
    if kind == "plain":  # torch's own sums are another with another width
        assert (narrow(rows) - wanted).abs().max() < 1e-6
    else:
        assert torch.equal(narrow(rows), wanted)
    assert bytes_of(narrow, whole) == outputs_bytes(whole, len(KEPT))


@KIND
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [64, 72])
@torch.inference_mode()
def test_some_inputs_give_what_the_others_at_zero_give(kind: str, bias: bool, outputs: int) -> None:
    whole, rows = layer(kind, outputs, 80, bias), rows_of(80)
    narrow = with_inputs(whole, KEPT)
    only = torch.zeros_like(rows)
    only[:, kept_neurons()] = rows[:, kept_neurons()]
    wanted, found = whole(only), narrow(rows[:, kept_neurons()].contiguous())
    assert (found - wanted).abs().max() <= KINDS[kind][1] * wanted.abs().max()
    assert (found - whole(rows)).abs().max() > 0.1 * wanted.abs().max()
    assert bytes_of(narrow, whole) == inputs_bytes(whole, len(KEPT))
    every = torch.eye(80)[kept_neurons()]  # one input at a time: no rounding hides another weight
    wanted, found = whole(every), narrow(every[:, kept_neurons()].contiguous())
    assert (found - wanted).abs().max() <= 1e-6


@KIND
@pytest.mark.parametrize("matrices", [1, 2])
@torch.inference_mode()
def test_a_copy_of_an_mlp_is_the_mlp_without_the_other_neurons(kind: str, matrices: int) -> None:
    """Gate and up in one matrix (all gates first), or each in its own."""
    first = [layer(kind, 160 // matrices + 160 * at, 64, False) for at in range(matrices)][:1]
    if matrices == 2:
        first = [layer(kind, 80, 64, False), layer(kind, 80, 64, True)]
    whole = Mlp(first, torch.nn.functional.silu, layer(kind, 64, 80, False), gated=True)
    rows, copy = rows_of(64), whole.copy(KEPT)
    inner = whole.activations(rows)
    assert whole.blocks == 5 and inner.shape == (3, 80)
    only = torch.zeros_like(inner)
    only[:, kept_neurons()] = inner[:, kept_neurons()]
    wanted = whole._down(only)
    assert (copy(rows) - wanted).abs().max() <= KINDS[kind][1] * wanted.abs().max()
    parts = [*copy._first, copy._down]  # type: ignore[attr-defined]
    olds = [*whole._first, whole._down]
    counted = sum(bytes_of(new, old) for new, old in zip(parts, olds, strict=True))
    assert counted == whole.copy_bytes(len(KEPT))


def test_formats_whose_inputs_share_scales_are_left_whole() -> None:
    form = TileFormat("int4", 32, "float16", "float")
    coarse = TileLinear.encode(torch.nn.Linear(64, 64), form, Scratch())
    assert not is_linear(coarse) and not is_linear(torch.nn.LayerNorm(64))
    assert all(is_linear(layer(kind, 64, 64, False)) for kind in KINDS)
