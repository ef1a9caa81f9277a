"""How stored numbers become weights: unpacking and scaling, tensors in and tensors out.

Letters: O outputs, I inputs of a matrix, G groups of inputs, b bits of a number.
"""

import torch

# the values of e2m1, a sign bit in front (OCP Microscaling Formats, v1.0)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Whole numbers from 0 on: each int32 of `words` has 32 / b along `dim`, the lowest first."""
    dim %= words.dim()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    mask = (1 << bits) - 1
    spread = (words.unsqueeze(dim + 1) >> shifts.view(-1, *(1,) * (words.dim() - dim - 1))) & mask
    return spread.flatten(dim, dim + 1)


def grouped(numbers: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[O, I] float32: `numbers` [O, I] times the `scales` [O, G] of each input's group [I]."""
    return numbers.float() * scales.float()[:, groups]


def group_of_input(inputs: int, groups: int) -> torch.Tensor:
    """[I] the group of each input, of equal sizes but for the last."""
    size = -(-inputs // groups)
    return torch.arange(inputs) // size


def block_scaled(
    numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]
) -> torch.Tensor:
    """[O, I] float32: `numbers` [O, I] times `scales` [O / rows, I / columns] of each block."""
    rows, columns = block
    spread = scale_values(scales).repeat_interleave(rows, dim=0)[: numbers.shape[0]]
    spread = spread.repeat_interleave(columns, dim=1)[:, : numbers.shape[1]]
    return numbers.float() * spread


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """float32; bytes are exponents of 2 (e8m0)."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - 127)
    return scales.float()


def fp4_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[O, I] float32 of `blocks` uint8 [O, G, 16], two e2m1 a byte, and exponents [O, G]."""
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [O, G, 32]
    found = values[pairs.long()] * scale_values(scales)[..., None]
    return found.flatten(-2)
