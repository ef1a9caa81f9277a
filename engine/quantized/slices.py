"""A tensor that is put together from others of the files, when it is read.

It looks like safetensors' own slices: shape and dtype cost nothing, indexing reads. Where its
numbers lie on a grid, codes, scales and zeros can be read in its place: whoever keeps those keeps
each weight exactly, where decoding and encoding again rounds twice.

Letters: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Slice = Any  # safetensors' PySafeSlice, or what has its get_dtype, get_shape and indexing
Slices = Mapping[str, Slice]
Decode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int32: "I32",
}
INT4, FP8 = "int4", "fp8"


@dataclass(frozen=True, slots=True)
class Decoded:
    """`parts` are read whole, and `decode` makes float32 of them, rounded to `dtype`.

    With `leading` the parts' first dimension is the result's, and is gone through one by one, so
    that a whole layer's experts never lie in float32 side by side. `grid` has the same numbers
    before any rounding.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Slices
    decode: Decode
    leading: bool = False
    grid: "Grid | str" = "its numbers lie on no grid of int4 or fp8"  # or why there is none

    def get_dtype(self) -> str:
        return NAMES[self.dtype]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """`rows` as in torch. Raises what reading the files raises."""
        if not self.leading:
            whole = self.decode({name: part[...] for name, part in self.parts.items()})
            return whole.to(self.dtype)[rows].contiguous()
        count = self.shape[0]
        chosen = range(count)[rows] if isinstance(rows, slice) else range(count)
        made = torch.empty(len(chosen), *self.shape[1:], dtype=self.dtype)
        for place, number in enumerate(chosen):
            one = {name: part[number : number + 1][0] for name, part in self.parts.items()}
            made[place] = self.decode(one)
        return made


@dataclass(frozen=True, slots=True)
class GridForm:
    """int4: w = scale * (code - zero), with `zero` none scale * (code - 8), with float
    scale * code + zero. fp8: e4m3 * scale.
    """

    kind: str  # INT4 or FP8
    group: int  # inputs that share a scale; 0: all of a row
    scale: str  # float32, float16 or bfloat16
    zero: str = "none"  # or integer, or float
    ordered: bool = False  # a group is of any inputs (act-order), not of neighbours


@dataclass(frozen=True, slots=True)
class Grid:
    """The parts of one matrix, or of matrices stacked, in the order that the decoded one has."""

    form: GridForm
    codes: Decoded  # uint8 [O, I]: 0 to 15, or the bytes of e4m3
    scales: Decoded  # [O, G]
    zeros: Decoded | None = None  # [O, G], with `zero` integer uint8, with float as the scales
    orders: Decoded | None = None
    """int32 [1, I], where the form is ordered: the inputs of group 0, then those of 1, and on."""
    check: Callable[[], None] = lambda: None
    """Raises ModelRefused where the files are not as `quantization_config` says."""
