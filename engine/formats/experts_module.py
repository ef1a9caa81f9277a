"""What one experts module of a model is, from its flags and shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moestro.engine.kernels import TileFormat


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One experts module of the model: its path and, per parameter, dtype and shape [E, ...]."""

    path: str
    num_experts: int
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # the same as its class keeps them
    source_keys: tuple[str, ...]
    transposed: bool  # matrices are [in, out], not [out, in]
    grids: Mapping[str, TileFormat] = field(default_factory=dict)
    """How each matrix lies in the files, where tiles can hold all of them exactly; else empty."""
    orders: Mapping[str, int] = field(default_factory=dict)
    """Matrices of `grids` whose inputs lie in an order of their own: of how many parts each is."""
    no_grid: str = ""  # why, where the files are quantized

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's tensors in the checkpoint's dtype."""
        total = 0
        for dtype, shape in self.tensors.values():
            total += torch.Size(shape).numel() * dtype.itemsize
        return total // self.num_experts


def is_experts_module(module: torch.nn.Module) -> bool:
    """True for classes that carry transformers' experts interface (its decorator sets these)."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")
