"""What a dense family tells about itself, in terms of Llama: the names and forms of the twin.

Attention, norms, embeddings and head have the same names in Llama and in the twin; an FFN is read
as Llama's gate, up and down. Letters: H hidden size, I neurons of an FFN.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

Make = Callable[[Sequence[torch.Tensor]], torch.Tensor]


class LayerKind(NamedTuple):
    """How a layer attends."""

    window: int | None = None  # tokens that a token sees, itself included; None: all before it
    rotates: bool = True  # False: no positions (NoPE)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor on one side, made of tensors on the other."""

    sources: tuple[str, ...]
    make: Make
    rounds: bool = False  # not the source's own numbers: kept in float32


Parts = dict[str, Part]


class Family(Protocol):
    """One entry of FAMILIES. `config` is the dense model's, of this family."""

    @property
    def title(self) -> str:
        """How people call it."""

    def obstacles(self, config: Any) -> Iterator[str]:
        """Why this model has no exact twin; nothing when it has one."""

    def layers(self, config: Any) -> list[LayerKind]:
        """One per layer."""

    def told_by_twin(self, config: Any) -> bool:
        """Whether the way back needs no copy of the dense model's config.json."""

    def twin_fields(self, config: Any) -> dict[str, Any]:
        """Fields of the twin's configuration that are not Llama's."""

    def twin_parts(self, names: Collection[str], config: Any) -> Parts:
        """Llama's names, made of the dense model's `names`."""

    def dense_parts(self, names: Collection[str], config: Any) -> Parts:
        """The dense model's names, made of Llama's `names`: undoes `twin_parts`."""

    def gate_of(self, mlp: Any) -> torch.Tensor:
        """[I, H] what switches the neurons, of a layer's stock FFN module."""


def as_it_is(name: str) -> Part:
    return Part((name,), lambda tensors: tensors[0])


def all_as_they_are(names: Collection[str]) -> Parts:
    return {name: as_it_is(name) for name in names}


def layer_prefixes(names: Collection[str]) -> list[str]:
    """`model.layers.0.` and so on, of all layers that `names` has."""
    numbers = {int(n.split(".")[2]) for n in names if n.startswith("model.layers.")}
    return [f"model.layers.{number}." for number in sorted(numbers)]
