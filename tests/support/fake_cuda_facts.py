"""What an imagined GPU can do, and the errors of its driver."""

from dataclasses import dataclass
from enum import IntEnum

import torch


class Code(IntEnum):
    """Of cudaError_t."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    ILLEGAL_ADDRESS = 700
    ALREADY_REGISTERED = 712
    NOT_REGISTERED = 713

    @property
    def error(self) -> torch.AcceleratorError:
        return torch.AcceleratorError(f"CUDA error: {self.name.lower().replace('_', ' ')}")


@dataclass(frozen=True)
class Gpu:
    """What it can do."""

    memory_bytes: int = 1 << 30
    copy_bytes_per_s: float = 25e9  # each way
    call_s: float = 1e-6  # of the host, for each call
    kernel_s: float = 5e-6
    register_bytes: float = float("inf")  # in one piece
    register_all_bytes: float = float("inf")
    pinned_bytes: float = float("inf")  # of torch
