"""A safetensors file that the library will not open: what is wrong, in sizes, or its tensors.

A file is 8 bytes of length, a header of that length in JSON, and the data, which the header's
offsets cover without gaps. One that goes on for a few bytes behind its data (padding of a storage
or a transfer) is whole, and is read here; the library takes none.
"""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moestro.engine.facts import ModelRefused

from .damage import readable, refuse_stand_in

LENGTH_BYTES = 8  # of the header, in front of it
MAX_HEADER_BYTES = 100_000_000  # that safetensors takes
# A block of a storage. More is no padding: a download that went on at a wrong place leaves as much,
# and then what stands before it is wrong, too.
MAX_PADDING_BYTES = 4096
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class PaddedSlice:
    """One tensor, read when it is indexed, as safetensors' own slices are."""

    path: Path
    dtype_name: str
    shape: tuple[int, ...]
    start_bytes: int  # from the start of the file

    def get_dtype(self) -> str:
        return self.dtype_name

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """`rows` is `...` or a slice of the first dimension with step 1. Raises OSError."""
        dtype = DTYPES[self.dtype_name]
        first, end = (0, None) if rows is Ellipsis else (rows.start or 0, rows.stop)
        shape = self.shape
        if rows is not Ellipsis:
            first, end, _ = slice(first, end).indices(shape[0])
            shape = (max(0, end - first), *shape[1:])
        data = bytearray(torch.Size(shape).numel() * dtype.itemsize)
        if not data:
            return torch.empty(shape, dtype=dtype)
        row_bytes = torch.Size(self.shape[1:]).numel() * dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start_bytes + first * row_bytes)
            if file.readinto(data) != len(data):
                raise OSError(errno.EIO, "the file has become shorter", str(self.path))
        return torch.frombuffer(data, dtype=dtype).view(shape)


def padded_slices(path: Path, cause: str) -> tuple[dict[str, PaddedSlice], int]:
    """{key: slice} of a file that safetensors refuses with `cause`, and the bytes behind its data.

    Raises ModelRefused, with the sizes, where it is not whole.
    """
    refuse_stand_in(path)
    size_bytes, header = _header(path, cause)
    found = _parsed(header, path, LENGTH_BYTES + len(header))
    if found is None:
        raise ModelRefused(f"{path} is not a whole safetensors file ({cause}); fetch it again")
    slices, end_bytes = found
    if size_bytes < end_bytes:
        raise ModelRefused(
            f"{path} is truncated: it has {size_bytes} bytes of the {end_bytes} that its header"
            " speaks of; fetch it again"
        )
    spare_bytes = size_bytes - end_bytes
    known = all(part.dtype_name in DTYPES for part in slices.values())
    if not known or not 0 < spare_bytes <= MAX_PADDING_BYTES:
        raise ModelRefused(
            f"{path} is not a whole safetensors file: it has {size_bytes} bytes, and its header"
            f" speaks of {end_bytes} ({cause}); fetch it again"
        )
    return slices, spare_bytes


def _header(path: Path, cause: str) -> tuple[int, bytes]:
    """The file's size in bytes, and its header. Raises ModelRefused where it has no whole one."""
    with readable(path), path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        end_bytes = LENGTH_BYTES + length_bytes
        start = file.read(1)
        if size_bytes > LENGTH_BYTES and (length_bytes > MAX_HEADER_BYTES or start != b"{"):
            raise ModelRefused(
                f"{path} is not a safetensors file: its {size_bytes} bytes begin with no header"
                f" ({cause}); fetch it again"
            )
        if size_bytes < end_bytes:
            raise ModelRefused(
                f"{path} is truncated: it has {size_bytes} bytes, and its header alone ends at"
                f" {end_bytes}; fetch it again"
            )
        return size_bytes, (start + file.read(max(0, length_bytes - 1)))[:length_bytes]


def _parsed(
    text: bytes, path: Path, data_at_bytes: int
) -> tuple[dict[str, PaddedSlice], int] | None:
    """The slices and where the last one ends; None unless they cover the data without gaps."""
    slices = {}
    end_bytes = 0
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            shape = tuple(map(int, entry["shape"]))
            numbers = torch.Size(shape).numel()
            dtype = DTYPES.get(entry["dtype"])
            if first != end_bytes or (dtype and last - first != numbers * dtype.itemsize):
                return None
            slices[key] = PaddedSlice(path, entry["dtype"], shape, data_at_bytes + first)
            end_bytes = last
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    return slices, data_at_bytes + end_bytes
