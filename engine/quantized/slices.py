"""A tensor that is put together from others of the files, when it is read.

It looks like safetensors' own slices: shape and dtype cost nothing, indexing reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Slice = Any  # safetensors' PySafeSlice, or what has its get_dtype, get_shape and indexing
Slices = Mapping[str, Slice]
Decode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Decoded:
    """`parts` are read whole, and `decode` makes float32 of them, rounded to `dtype`.

    With `leading` the parts' first dimension is the result's, and is gone through one by one, so
    that a whole layer's experts never lie in float32 side by side.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Slices
    decode: Decode
    leading: bool = False

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
