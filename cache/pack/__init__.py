"""The files: a pack of experts, written whole or resumed, and tensors kept beside it."""

from .blobfile import huge_memory, page_memory, stream_memory
from .build import PackWriter, open_or_build
from .file import Pack, prove
from .lockfile import wait_for_lock
from .read_queue import ReadQueue
from .tensor_file import holds_tensors, read_tensors, write_tensors
from .views import TensorViews, blob_views

__all__ = [
    "Pack",
    "PackWriter",
    "ReadQueue",
    "TensorViews",
    "blob_views",
    "open_or_build",
    "page_memory",
    "prove",
    "holds_tensors",
    "huge_memory",
    "read_tensors",
    "stream_memory",
    "wait_for_lock",
    "write_tensors",
]
