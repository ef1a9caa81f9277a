"""One tensor of a GGUF file: read with `pread`, and decoded by the gguf library, when indexed."""

import os
import weakref
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from moestro.engine.facts import ModelRefused

from .header import Entry

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class Opened:
    """A file that is open until nothing asks for it any more. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset_bytes: int, length_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Raises OSError, also where the file has become shorter."""
        data = np.empty(length_bytes, dtype=np.uint8)
        done = 0
        while done < length_bytes:
            got = os.preadv(self._fd, [data[done:].data], offset_bytes + done)
            if got == 0:
                raise OSError(f"{self.path} has become shorter than it was; fetch it again")
            done += got
        return data


class Stored:
    """A safetensors slice to look at: its dtype and shape cost nothing, indexing reads float32.

    `entry` is one that `check_entry` let pass.
    """

    def __init__(self, entry: Entry, file: Opened) -> None:
        self.entry = entry
        self.shape = entry.shape
        self.kind = GGMLQuantizationType(entry.kind)
        self._file = file
        self._row_bytes = _row_bytes(entry)

    @property
    def dtype(self) -> torch.dtype:
        """The one that holds each of its numbers: float32 for what is in blocks."""
        return PLAIN.get(self.kind, torch.float32)

    def get_dtype(self) -> str:
        return self.kind.name

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """float32; `rows` is `...` or a slice of the first dimension."""
        values = gguf.dequantize(self.stored_rows(rows), self.kind)
        whole = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return whole if len(self.shape) > 1 else whole[rows]

    def stored_rows(self, rows: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes as they lie, [..., bytes of a row]; of a tensor of one dimension all of it."""
        first, last, _ = rows.indices(self.shape[0]) if isinstance(rows, slice) else (0, None, 1)
        last = self.shape[0] if last is None else last
        shape = (last - first, *self.shape[1:]) if len(self.shape) > 1 else (self.shape[0],)
        each = prod(self.shape[1:-1]) * self._row_bytes if len(self.shape) > 1 else 0
        length = prod(shape[:-1]) * self._row_bytes
        data = self._file.read(self.entry.offset_bytes + first * each, length)
        return data.reshape(*shape[:-1], self._row_bytes)


def stored(entries: tuple[Entry, ...], path: Path) -> dict[str, Stored]:
    """{name in the file: tensor} of one file. Raises OSError."""
    file = Opened(path)
    return {entry.name: Stored(entry, file) for entry in entries}


def check_entry(entry: Entry, file_bytes: int) -> None:
    """Raises ModelRefused for a type that is not decoded, and where the file ends too early."""
    name = _undecoded(entry.kind)
    if name is not None:
        raise ModelRefused(
            f"{entry.path}: tensor {entry.name} is of ggml's type {name}, which the gguf library"
            " does not decode; take a file of another quantization, such as Q4_K_M or Q8_0"
        )
    block, _ = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
    if entry.shape[-1] % block:
        raise ModelRefused(
            f"{entry.path}: tensor {entry.name} of shape {entry.shape} is no whole number of"
            f" blocks of {block}; fetch it again"
        )
    end = entry.offset_bytes + prod(entry.shape[:-1]) * _row_bytes(entry)
    if end > file_bytes:
        raise ModelRefused(
            f"{entry.path} is cut off: it has {file_bytes} bytes, and tensor {entry.name} ends at"
            f" {end}; fetch it again"
        )


def _row_bytes(entry: Entry) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(entry.kind)]
    return entry.shape[-1] // block * block_bytes


@cache
def _undecoded(number: int) -> str | None:
    """What a type is called that the library does not decode; None for one that it does."""
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return f"number {number}"
    try:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
    except (KeyError, NotImplementedError):
        return kind.name
    return None
