"""The memory of the slots: equal slabs, page-aligned, with every tensor view made beforehand."""

from collections.abc import Sequence
from itertools import chain

import torch

from .blobfile import page_memory
from .layout import BlobLayout

TensorViews = dict[str, torch.Tensor]


def blob_views(flat: torch.Tensor, offset_bytes: int, layout: BlobLayout) -> TensorViews:
    """The tensors of one blob as views into `flat` (uint8), where the blob begins at the offset."""
    views = {}
    for spec, start in zip(layout.tensors, layout.offsets, strict=True):
        first = offset_bytes + start
        part = flat[first : first + spec.size_bytes]
        views[spec.name] = part.view(getattr(torch, spec.dtype)).view(spec.shape)
    return views


class SlotArena:
    """`slots` slabs of `slot_bytes` each. Takes memory from the system as slots are first used."""

    def __init__(self, slots: int, slot_bytes: int, kinds: Sequence[Sequence[BlobLayout]]) -> None:
        """`kinds[layer]` is how an expert of that layer may lie in any slot: one layout, mostly."""
        memory = page_memory(slots * slot_bytes)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self._bytes = memoryview(memory)
        self._slot_bytes = slot_bytes
        self._by_layout = {
            layout: [blob_views(flat, slot * slot_bytes, layout) for slot in range(slots)]
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

    def buffer(self, slot: int, size_bytes: int) -> memoryview:
        """The first bytes of a slot, to be read into; begins at a page."""
        start = slot * self._slot_bytes
        return self._bytes[start : start + size_bytes]
