"""One tensor of a GGUF file: read with `pread`, and decoded by the gguf library, when indexed."""

import os
import weakref
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

    Raises ModelRefused for a type that is not decoded, and where the file ends before the tensor.
    """

    def __init__(self, entry: Entry, file: Opened) -> None:
        self.name = entry.name
        self.shape = entry.shape
        self.kind = _decodable(entry)
        self._file = file
        self._offset_bytes = entry.offset_bytes
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        if entry.shape[-1] % block:
            raise ModelRefused(
                f"{entry.path}: tensor {entry.name} of shape {entry.shape} is no whole number of"
                f" blocks of {block} ({self.kind.name}); fetch it again"
            )
        self._row_bytes = entry.shape[-1] // block * block_bytes
        end = entry.offset_bytes + prod(entry.shape[:-1]) * self._row_bytes
        if end > file.size_bytes:
            raise ModelRefused(
                f"{entry.path} is cut off: it has {file.size_bytes} bytes, and tensor {entry.name}"
                f" ends at {end}; fetch it again"
            )

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
        first, last, _ = rows.indices(self.shape[0]) if isinstance(rows, slice) else (0, None, 1)
        last = self.shape[0] if last is None else last
        shape = (last - first, *self.shape[1:]) if len(self.shape) > 1 else (self.shape[0],)
        each = prod(self.shape[1:-1]) * self._row_bytes if len(self.shape) > 1 else 0
        length = prod(shape[:-1]) * self._row_bytes
        data = self._file.read(self._offset_bytes + first * each, length)
        values = gguf.dequantize(data.reshape(*shape[:-1], self._row_bytes), self.kind)
        whole = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(shape)
        return whole if len(self.shape) > 1 else whole[rows]


def stored(entries: tuple[Entry, ...], path: Path) -> dict[str, Stored]:
    """{name in the file: tensor} of one file. Raises ModelRefused, OSError."""
    file = Opened(path)
    return {entry.name: Stored(entry, file) for entry in entries}


def _decodable(entry: Entry) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(entry.kind)
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        try:
            name = GGMLQuantizationType(entry.kind).name
        except ValueError:
            name = f"number {entry.kind}"
        raise ModelRefused(
            f"{entry.path}: tensor {entry.name} is of ggml's type {name}, which the gguf library"
            " does not decode; take a file of another quantization, such as Q4_K_M or Q8_0"
        ) from error
    return kind
