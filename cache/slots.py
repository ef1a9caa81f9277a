"""The memory of the slots: equal slabs, page-aligned, with every tensor view made beforehand."""

from collections.abc import Sequence

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

    def __init__(self, slots: int, slot_bytes: int, layouts: Sequence[BlobLayout]) -> None:
        """`layouts[layer]` is how an expert of that layer lies in any slot."""
        memory = page_memory(slots * slot_bytes)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self._bytes = memoryview(memory)
        self._slot_bytes = slot_bytes
        by_layout = {
            layout: [blob_views(flat, slot * slot_bytes, layout) for slot in range(slots)]
            for layout in dict.fromkeys(layouts)
        }
        self.views: list[list[TensorViews]] = [by_layout[layout] for layout in layouts]
        """[layer][slot]; making a view costs microseconds, so none is made while serving."""

    def buffer(self, slot: int, size_bytes: int) -> memoryview:
        """The first bytes of a slot, to be read into; begins at a page."""
        start = slot * self._slot_bytes
        return self._bytes[start : start + size_bytes]
