"""Named tensors in one file, read back past the page cache into one piece of memory.

    bytes 0..23   magic, format version, crc32 of the header, length of the header
    then          header: JSON with the owner's key, name, dtype, shape and offset of every tensor,
                  and the crc32 of every chunk of the data (8 hex digits each)
    then          at a page: the data, each tensor at a multiple of 64 bytes

Written aside, synced, renamed; the header last of all. For what is read whole at every start; what
is read piece by piece lies in a pack. Knows no model.
"""

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch

from moestro.cache.facts import (
    DTYPE_BYTES,
    PAGE_BYTES,
    PackInvalid,
    PackUnwritable,
    ReadFailed,
    round_up,
)

from .blobfile import BlobFile, page_memory, stream_memory
from .partial import sync_folder

_MAGIC = b"moestens"
_FORMAT_VERSION = 1
_PREAMBLE = struct.Struct("<8sIIQ")
_ALIGN_BYTES = 64
_CHUNK_BYTES = 8 << 20
_SYNC_BYTES = 64 << 20  # dirty pages allowed to pile up: they count as memory, too
_READ_THREADS = 2  # one reads while the other compares what it has read

OnBytes = Callable[[int, int], None]  # (bytes done, bytes of all tensors)


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int  # from the first byte of the data

    @property
    def size_bytes(self) -> int:
        return int(torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize)


def write_tensors(
    path: Path, key: str, tensors: Mapping[str, torch.Tensor], on_bytes: OnBytes
) -> bool:
    """False, and nothing is done, while another process writes the same file.

    One object under several names is written once. `on_bytes` may raise to give up. Raises
    PackUnwritable. Whatever ends it early, nothing half-written stays.
    """
    places, data_bytes = _places(tensors)
    aside = path.with_name(path.name + ".partial")
    with _refused(path), _alone(aside) as fd:
        if fd < 0:
            return False
        with ExitStack() as undo:
            undo.callback(aside.unlink, missing_ok=True)
            os.ftruncate(fd, 0)
            first = _first_byte(key, places, data_bytes)
            sums = []
            for at, chunk in _chunks(tensors, places, data_bytes):
                on_bytes(at, data_bytes)
                sums.append(zlib.crc32(chunk))
                _write(fd, first + at, chunk)
                if (at + len(chunk)) % _SYNC_BYTES == 0:
                    _sync(fd)
            _write(fd, 0, memoryview(_header(key, places, sums)))
            _sync(fd)
            aside.replace(path)
            undo.pop_all()
            sync_folder(path.parent)
    return True


def read_tensors(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors in one page-aligned piece of memory, compared with their sums.

    What was one object under several names is one again. Raises PackInvalid where there is no such
    file, or it is of another owner, or damaged.
    """
    try:
        file = BlobFile(path)
    except OSError as error:
        raise PackInvalid(f"{path}: {error.strerror}") from error
    try:
        places, sums, first = _read_header(path, file, key)
        data_bytes = file.size_bytes - first
        if len(sums) != len(_chunk_starts(data_bytes)):
            raise PackInvalid(f"{path} is truncated")
        memory = stream_memory(max(PAGE_BYTES, data_bytes))

        def read(number: int) -> None:
            start = number * _CHUNK_BYTES
            chunk = memoryview(memory)[start : min(start + _CHUNK_BYTES, data_bytes)]
            file.read_into(first + start, [chunk])
            if zlib.crc32(chunk) != sums[number]:
                raise PackInvalid(f"{path} is damaged: chunk {number} has another checksum")

        with ThreadPoolExecutor(_READ_THREADS, "moestro-tensors") as pool:
            list(pool.map(read, range(len(sums))))
    except ReadFailed as error:
        raise PackInvalid(str(error)) from error
    finally:
        file.close()
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    views: dict[int, torch.Tensor] = {}
    for place in places:
        if place.offset_bytes not in views:
            views[place.offset_bytes] = _view(path, flat[:data_bytes], place)
    return {place.name: views[place.offset_bytes] for place in places}


def holds_tensors(path: Path, key: str) -> bool:
    """Whether `read_tensors` finds a file of this owner there; only its header is read."""
    try:
        file = BlobFile(path)
    except OSError:
        return False
    try:
        _read_header(path, file, key)
    except (PackInvalid, ReadFailed):
        return False
    finally:
        file.close()
    return True


def _places(tensors: Mapping[str, torch.Tensor]) -> tuple[list[_Place], int]:
    """Where each tensor lies, and the bytes of the data: whole pages."""
    offsets: dict[int, int] = {}
    places, end = [], 0
    for name, tensor in tensors.items():
        if id(tensor) not in offsets:
            offsets[id(tensor)] = end
            end = round_up(end + max(1, tensor.nbytes), _ALIGN_BYTES)
        dtype = str(tensor.dtype).removeprefix("torch.")
        places.append(_Place(name, dtype, tuple(tensor.shape), offsets[id(tensor)]))
    return places, round_up(end, PAGE_BYTES)


def _chunks(
    tensors: Mapping[str, torch.Tensor], places: list[_Place], data_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of the data, one chunk after the other; each is valid until the next."""
    memory = page_memory(_CHUNK_BYTES)
    flat, whole = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory)
    waiting = sorted({place.offset_bytes: place.name for place in places}.items())
    for start in _chunk_starts(data_bytes):
        end = min(start + _CHUNK_BYTES, data_bytes)
        flat[: end - start] = 0  # gaps are zeros, whatever lay there before
        while waiting and waiting[0][0] < end:
            offset, name = waiting[0]
            source = tensors[name].detach().reshape(-1).view(torch.uint8)
            low, high = max(offset, start), min(offset + source.numel(), end)
            flat[low - start : high - start] = source[low - offset : high - offset]
            if offset + source.numel() > end:
                break
            waiting.pop(0)
        yield start, whole[: end - start]


def _chunk_starts(data_bytes: int) -> range:
    return range(0, data_bytes, _CHUNK_BYTES)


def _header(key: str, places: list[_Place], sums: list[int]) -> bytes:
    listed = [[p.name, p.dtype, p.shape, p.offset_bytes] for p in places]
    record = {"key": key, "tensors": listed, "sums": [f"{each:08x}" for each in sums]}
    text = json.dumps(record).encode()
    return _PREAMBLE.pack(_MAGIC, _FORMAT_VERSION, zlib.crc32(text), len(text)) + text


def _first_byte(key: str, places: list[_Place], data_bytes: int) -> int:
    """Of the data: the page after the header, whose length does not depend on the sums."""
    no_sums = [0] * len(_chunk_starts(data_bytes))
    return round_up(len(_header(key, places, no_sums)), PAGE_BYTES)


def _read_header(path: Path, file: BlobFile, key: str) -> tuple[list[_Place], list[int], int]:
    """Places, sums, and where the data begins."""
    if file.size_bytes < PAGE_BYTES:
        raise PackInvalid(f"{path} is truncated")
    page = page_memory(PAGE_BYTES)
    file.read_into(0, [memoryview(page)])
    magic, version, checksum, length = _PREAMBLE.unpack_from(page)
    if magic != _MAGIC or version != _FORMAT_VERSION:
        raise PackInvalid(f"{path} is not of this version of moestro")
    first = round_up(_PREAMBLE.size + length, PAGE_BYTES)
    if first > file.size_bytes:
        raise PackInvalid(f"{path} is truncated")
    head = page_memory(first)
    file.read_into(0, [memoryview(head)])
    text = head[_PREAMBLE.size : _PREAMBLE.size + length]
    if zlib.crc32(text) != checksum:
        raise PackInvalid(f"{path} is damaged: its header has another checksum")
    try:
        record: dict[str, Any] = json.loads(text)
        if record["key"] != key:
            raise PackInvalid(
                f"{path} is of another model, format or version ({_unlike(record['key'], key)})"
            )
        return *_listed(record), first
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PackInvalid(f"{path} has no header of this version: {error}") from error


def _unlike(found: str, wanted: str) -> str:
    """The parts, which commas separate, that one key alone has."""
    mine, others = found.split(", "), wanted.split(", ")
    only = [
        ", ".join(part for part in one if part not in two)
        for one, two in ((mine, others), (others, mine))
    ]
    return f"{only[0]!r}, not {only[1]!r}"


def _listed(record: dict[str, Any]) -> tuple[list[_Place], list[int]]:
    places = [
        _Place(str(name), dtype, tuple(map(index, shape)), index(at))
        for name, dtype, shape, at in record["tensors"]
    ]
    for place in places:
        if place.dtype not in DTYPE_BYTES or min((place.offset_bytes, *place.shape)) < 0:
            raise ValueError(f"{place.name} is no tensor")
    return places, [int(each, 16) for each in record["sums"]]


def _view(path: Path, flat: torch.Tensor, place: _Place) -> torch.Tensor:
    end = place.offset_bytes + place.size_bytes
    if end > flat.numel():
        raise PackInvalid(f"{path} is truncated")
    part = flat[place.offset_bytes : end]
    return part.view(getattr(torch, place.dtype)).view(place.shape)


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """A descriptor of the new file `path` for as long as the block runs; -1 if it is another's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield -1
            return
        # Who had the lock before may have given the file its name meanwhile.
        yield fd if path.exists() and os.path.samestat(path.stat(), os.fstat(fd)) else -1
    finally:
        os.close(fd)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PackUnwritable(f"cannot write {path}: {error.strerror}") from error


def _write(fd: int, offset_bytes: int, data: memoryview) -> None:
    while data:
        done = os.pwrite(fd, data, offset_bytes)
        offset_bytes, data = offset_bytes + done, data[done:]


def _sync(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
