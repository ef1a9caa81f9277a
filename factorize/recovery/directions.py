"""Where low-rank deltas begin: along what the loss asks of a weight, not at random.

The loss falls fastest along the first singular vectors of its gradient by the whole weight (Wang et
al., 2024, "LoRA-GA", arXiv 2407.05000); deltas that begin on random inputs hold little of that, and
most of what they learn from few windows is noise. The gradient itself, as large as the weights, is
never there: a random sketch of it is enough (Halko et al., 2011, arXiv 0909.4061, algorithm 4.1).
Letters: O outputs, I inputs, G [O, I] the gradient, q rows of a sketch, r rank.
"""

from collections.abc import Callable

import torch
from torch import nn

from .student import LowRank

SPARE = 12  # rows of a sketch beyond the rank
Slopes = Callable[[], None]
"""Adds the gradients of the loss on some windows to those of all that learns."""


def begin_along_slopes(parts: list[LowRank], slopes: Slopes, seed: int) -> None:
    """Sets each of `parts` to as many input directions as its rank, the first singular ones of its

    gradient, and to outputs of 0.

    Calls `slopes` twice: G R^T spans the outputs, whose part of G tells the inputs. What the parts
    add stays zero the whole time.
    """
    draw = torch.Generator().manual_seed(seed)
    ranks = [len(part.out_of) for part in parts]
    for part, rank in zip(parts, ranks, strict=True):
        outputs, inputs = part.shape
        width = min(rank + SPARE, outputs, inputs)
        part.out_of = nn.Parameter(torch.randn(width, inputs, generator=draw) / inputs**0.5)
        part.into = nn.Parameter(torch.zeros(outputs, width))
    slopes()
    for part in parts:
        spanned, _ = torch.linalg.qr(_slope(part.into))
        part.into = nn.Parameter(spanned)
        part.out_of = nn.Parameter(torch.zeros_like(part.out_of))
    slopes()
    for part, rank in zip(parts, ranks, strict=True):
        _, _, directions = torch.linalg.svd(_slope(part.out_of), full_matrices=False)
        none = torch.zeros(max(0, rank - len(directions)), part.shape[1])
        part.out_of = nn.Parameter(torch.cat([directions[:rank], none]))
        part.into = nn.Parameter(torch.zeros(part.shape[0], rank))


def _slope(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad
