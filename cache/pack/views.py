"""A blob's tensors as views into the memory that it lies in."""

import torch

from moestro.cache.facts import BlobLayout

TensorViews = dict[str, torch.Tensor]


def blob_views(flat: torch.Tensor, offset_bytes: int, layout: BlobLayout) -> TensorViews:
    """The tensors of one blob as views into `flat` (uint8), where the blob begins at the offset."""
    views = {}
    for spec, start in zip(layout.tensors, layout.offsets, strict=True):
        first = offset_bytes + start
        part = flat[first : first + spec.size_bytes]
        views[spec.name] = part.view(getattr(torch, spec.dtype)).view(spec.shape)
    return views
