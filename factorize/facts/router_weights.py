"""The weights of routers: linear as stock checkpoints have them, or with more.

Letters: L layers, E experts, H hidden size, N neurons of a first layer, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

SMALLEST = 24  # float16 has multiples of 2**-24
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """logits = last @ activation(first @ x) + bias; without a first layer, last @ x + bias.

    Of one layer, or of all with a leading L. float16, logits about 1 in size.
    """

    last: torch.Tensor  # [E, H], or [E, N] behind a first layer
    first: torch.Tensor | None = None  # [N, H]
    bias: torch.Tensor | None = None  # [E]
    activation: str = ""  # behind the first layer

    @classmethod
    def stack(cls, layers: Sequence["RouterWeights"]) -> "RouterWeights":
        """Of all layers; they are of one kind."""

        def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
            there = [part for part in parts if part is not None]
            return torch.stack(there) if there else None

        return cls(
            torch.stack([layer.last for layer in layers]),
            joined([layer.first for layer in layers]),
            joined([layer.bias for layer in layers]),
            layers[0].activation,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """By field, those that are there."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in found.items() if isinstance(part, torch.Tensor)}

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """[T, E] of one layer's router from `inputs` [T, H], fp32."""
        if self.first is not None:
            inputs = ACTIVATIONS[self.activation](inputs @ self.first.float().T)
        logits = inputs @ self.last.float().T
        return logits if self.bias is None else logits + self.bias.float()

    def beyond_stock(self) -> Iterator[str]:
        """What a stock checkpoint's router cannot carry."""
        if self.first is not None:
            yield f"a first layer with {self.activation}"
        if self.bias is not None:
            yield "a bias"


def narrow(last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`last` [..., E, H] as int8 and, of each row, the exponent int8 [..., E] of its step.

    Steps are powers of two, so that what comes back is exact in float16.
    """
    wide = last.double()
    largest = wide.abs().amax(dim=-1).clamp_min(2.0**-SMALLEST)
    exponents = (largest / 127).log2().ceil().clamp_min(-SMALLEST)
    return (wide / exponents.exp2()[..., None]).round().to(torch.int8), exponents.to(torch.int8)


def widen(numbers: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Float16 of what `narrow` gave. Raises TypeError for other types."""
    if {numbers.dtype, exponents.dtype} != {torch.int8}:
        raise TypeError(f"routers in {numbers.dtype} with exponents in {exponents.dtype}")
    return (numbers.double() * exponents.double().exp2()[..., None]).half()
