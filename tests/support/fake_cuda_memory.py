"""The memory that an imagined GPU knows: where tensors lie, and who touched it last."""

from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch

from vector_clocks import Access, Shadow


class Place(Enum):
    DEVICE = "device"
    PINNED = "pinned"  # by torch
    REGISTERED = "registered"


@dataclass(frozen=True, eq=False)
class Region:
    """One allocation that CUDA knows."""

    base: int
    size_bytes: int
    place: Place
    shadow: Shadow
    memory: torch.Tensor | None  # held, so that its addresses are nobody else's

    def __lt__(self, other: "Region") -> bool:
        return self.base < other.base


@dataclass(frozen=True, slots=True)
class Span:
    region: Region
    start: int
    end: int


class Memory:
    """All of it, by address. What is held is held for good."""

    def __init__(self) -> None:
        self._regions: list[Region] = []

    def all(self, place: Place) -> list[Region]:
        return [region for region in self._regions if region.place is place]

    def size_bytes(self, place: Place) -> int:
        return sum(region.size_bytes for region in self.all(place))

    def at(self, pointer: int) -> Region | None:
        index = bisect_right(self._regions, pointer, key=lambda region: region.base)
        if not index:
            return None
        found = self._regions[index - 1]
        return found if pointer < found.base + found.size_bytes else None

    def add(
        self,
        pointer: int,
        size_bytes: int,
        place: Place,
        written: Access | None,
        memory: torch.Tensor | None = None,
    ) -> None:
        if size_bytes:
            shadow = Shadow(size_bytes, f"{place.value} {len(self.all(place))}", written)
            insort(self._regions, Region(pointer, size_bytes, place, shadow, memory))

    def hold(self, tensor: torch.Tensor, place: Place, written: Access | None) -> None:
        size_bytes = tensor.untyped_storage().nbytes()
        self.add(tensor.data_ptr(), size_bytes, place, written, tensor)

    def remove(self, region: Region) -> None:
        self._regions.remove(region)

    def spans(self, tensors: Iterable[torch.Tensor]) -> list[Span]:
        """Of those in known memory: from the first to the last byte."""
        found = []
        for tensor in tensors:
            region = self.at(tensor.data_ptr()) if tensor.numel() else None
            if region is not None:
                start = tensor.data_ptr() - region.base
                pairs = zip(tensor.shape, tensor.stride(), strict=True)
                extent = 1 + sum((size - 1) * stride for size, stride in pairs)
                found.append(Span(region, start, start + extent * tensor.element_size()))
        return found
