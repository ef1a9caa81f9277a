"""Where dense weights come from."""

from .dense import INDEX_NAME, CarriedReader, DenseModel, TensorReader, tensor_files
from .download import Downloader, PinnedFile, fetch
from .gguf_source import convert

__all__ = [
    "CarriedReader",
    "DenseModel",
    "Downloader",
    "INDEX_NAME",
    "PinnedFile",
    "TensorReader",
    "convert",
    "fetch",
    "tensor_files",
]
