"""Blocks of a matrix in tiles are the tiles of the blocks of the matrix."""

import pytest
import torch

from moestro.engine.kernels import TileFormat, encode, keep_inputs, keep_outputs
from moestro.engine.kernels.blocks import CUT
from moestro.engine.kernels.pack import pack_int8

KEPT = ([0], [4], [1, 2], [0, 3, 4], [4, 0])  # of 5


def matrix(outputs: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((outputs, inputs), generator=generator)


def neurons(blocks: list[int]) -> torch.Tensor:
    return torch.tensor([16 * block + place for block in blocks for place in range(16)])


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("inputs", [64, 50])
def test_blocks_of_outputs(kind: str, kept: list[int], inputs: int) -> None:
    weight, form = matrix(80, inputs), TileFormat(kind)
    found = keep_outputs(encode(weight, form), kept)
    assert torch.equal(found, encode(weight[neurons(kept)], form))


@pytest.mark.parametrize("kind", CUT[:3])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("outputs", [64, 50])
def test_blocks_of_inputs_of_floats(kind: str, kept: list[int], outputs: int) -> None:
    weight, form = matrix(outputs, 80), TileFormat(kind)
    found = keep_inputs(encode(weight, form), form, 80, kept)
    assert torch.equal(found, encode(weight[:, neurons(kept)].contiguous(), form))
    assert found.shape == form.shape(outputs, 16 * len(kept))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 80), (48, 80), (64, 96)])
def test_blocks_of_inputs_of_int8_keep_their_outputs_scales(
    kept: list[int], outputs: int, inputs: int
) -> None:
    """80 inputs are padded to 96, and so is an odd number of blocks.

    Outputs are whole tiles: what stands for none is multiplied by scales of zero, whatever it is.
    """
    form = TileFormat("int8")
    values = matrix(outputs, inputs).mul(40).clamp(-127, 127).to(torch.int8)
    scales = matrix(outputs, 1)[:, 0].abs()
    found = keep_inputs(pack_int8(values, scales, form), form, inputs, kept)
    wanted = pack_int8(values[:, neurons(kept)].contiguous(), scales, form)
    assert torch.equal(found, wanted)
    assert found.shape == form.shape(outputs, 16 * len(kept))
