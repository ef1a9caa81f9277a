"""The memory of the slots: equal slabs, page-aligned, with every tensor view made beforehand."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

import torch

from moestro.cache.facts import BlobLayout
from moestro.cache.pack import TensorViews, blob_views, stream_memory


class SlotViews:
    """Equal slabs in one tensor, with every view made beforehand."""

    def __init__(
        self, flat: torch.Tensor, slot_bytes: int, kinds: Sequence[Sequence[BlobLayout]]
    ) -> None:
        """`kinds[layer]` is how an expert of that layer may lie in any slot: one layout, mostly."""
        self.flat = flat
        """All of it, [slots * slot_bytes], uint8."""
        self.slot_bytes = slot_bytes
        slots = range(flat.numel() // slot_bytes)
        self._by_layout = {
            layout: [blob_views(flat, slot * slot_bytes, layout) for slot in slots]
            for layout in dict.fromkeys(chain.from_iterable(kinds))
        }
        self.views: list[list[TensorViews]] = [
            self._by_layout[first] if not others else list(self._by_layout[first])
            for first, *others in kinds
        ]
        """[layer][slot]; making a view costs microseconds, so none is made while serving."""

    def show(self, layer: int, slot: int, layout: BlobLayout) -> None:
        """In a mixed layer: the slot is given to an expert of this layout."""
        self.views[layer][slot] = self._by_layout[layout][slot]


class Arena(Protocol):
    """Memory that experts are computed from, by slot."""

    views: list[list[TensorViews]]
    """[layer][slot]: the tensors of an expert of that layer, while the slot holds one."""

    def show(self, layer: int, slot: int, layout: BlobLayout) -> None:
        """In a mixed layer: the slot is given to an expert of this layout."""

    def buffers(self, slots: Sequence[int], sizes: Sequence[int]) -> tuple[memoryview, ...]:
        """So many first bytes of each slot, to be read into; none where nothing can be."""

    def used(self, slots: Iterable[int]) -> None:
        """All work on these slots has been queued: whoever overwrites them waits for it.

        Where work is done when a call returns, there is nothing to wait for.
        """


class SlotArena(SlotViews):
    """`slots` slabs of `slot_bytes` each. Takes memory from the system as slots are first used."""

    def __init__(self, slots: int, slot_bytes: int, kinds: Sequence[Sequence[BlobLayout]]) -> None:
        memory = stream_memory(slots * slot_bytes)
        super().__init__(torch.frombuffer(memory, dtype=torch.uint8), slot_bytes, kinds)
        self._bytes = memoryview(memory)
        self._made: dict[tuple[int, int], memoryview] = {}  # by slot and size

    def buffer(self, slot: int, size_bytes: int) -> memoryview:
        """The first bytes of a slot, to be read into; begins at a page."""
        start = slot * self.slot_bytes
        return self._bytes[start : start + size_bytes]

    def buffers(self, slots: Sequence[int], sizes: Sequence[int]) -> tuple[memoryview, ...]:
        made, wanted = self._made, list(zip(slots, sizes, strict=True))
        for pair in wanted:
            if pair not in made:
                made[pair] = self.buffer(*pair)
        return tuple(made[pair] for pair in wanted)

    def used(self, slots: Iterable[int]) -> None:
        """The CPU's work is done when a call returns."""


class AliasArena:
    """Slots without memory: each shows the slot of another arena that was last put into it.

    For measuring what a device would do without moving a byte.
    """

    def __init__(self, slots: int, layers: int) -> None:
        self.views: list[list[TensorViews]] = [[{} for _ in range(slots)] for _ in range(layers)]

    def show(self, layer: int, slot: int, layout: BlobLayout) -> None:
        """What is put into a slot brings its layout."""

    def buffers(self, slots: Sequence[int], sizes: Sequence[int]) -> tuple[memoryview, ...]:
        return ()

    def used(self, slots: Iterable[int]) -> None:
        """What is shown never changes: nobody has to wait."""
