"""Where dense weights come from."""

from .dense import INDEX_NAME, DenseModel, TensorReader
from .download import Downloader, PinnedFile, fetch
from .gguf_source import convert

__all__ = [
    "DenseModel",
    "Downloader",
    "INDEX_NAME",
    "PinnedFile",
    "TensorReader",
    "convert",
    "fetch",
]
