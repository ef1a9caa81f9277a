"""How many experts (or blocks of neurons) of a layer a density keeps, and which. No tensors."""

import math
from collections.abc import Sequence


def kept_count(num_experts: int, density: float) -> int:
    """The nearest whole number to `density` (in (0, 1]) of them, halves up; at least one."""
    return max(1, math.floor(density * num_experts + 0.5))


def largest(shares: Sequence[float], density: float) -> tuple[int, ...]:
    """The experts that are kept, the largest of `shares` first; equals in the order of numbers."""
    order = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
    return tuple(order[: kept_count(len(shares), density)])
