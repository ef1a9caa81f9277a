"""Q4_0 and Q4_1 taken apart: a block of 32 inputs is a scale, in Q4_1 a zero, and 16 bytes.

Both numbers are float16. Byte j of the 16 has input j in its low half and input 16 + j in its high
one; Q4_0 means scale * (code - 8), Q4_1 scale * code + zero.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from moestro.engine.quantized import GridForm

from .stored import Stored

LENGTH = 32  # inputs of a block
HALF = 2  # bytes of a scale or a zero
FORMS: Mapping[Kind, GridForm] = MappingProxyType(
    {
        Kind.Q4_0: GridForm("int4", LENGTH, "float16", "none"),
        Kind.Q4_1: GridForm("int4", LENGTH, "float16", "float"),
    }
)


class BlockPart:
    """A safetensors slice to look at: the codes, the scales or the zeros of one tensor."""

    def __init__(self, tensor: Stored, part: str) -> None:
        """`part` is codes, scales or zeros."""
        self._tensor, self._part = tensor, part
        *leading, inputs = tensor.shape
        self._shape = [*leading, inputs if part == "codes" else inputs // LENGTH]

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """float32, which holds each of them; `rows` is `...` or a slice of the first dimension."""
        stored = self._tensor.stored_rows(rows)
        count = stored.shape[-1] * LENGTH // self._tensor.shape[-1]  # bytes of a block
        each = stored.reshape(*stored.shape[:-1], -1, count)
        if self._part == "codes":
            halves = each[..., -LENGTH // 2 :]
            found = np.concatenate([halves & 15, halves >> 4], axis=-1)
        else:
            start = 0 if self._part == "scales" else HALF
            found = np.ascontiguousarray(each[..., start : start + HALF]).view("<f2")
        return torch.from_numpy(found.reshape(*stored.shape[:-1], -1).astype(np.float32))
