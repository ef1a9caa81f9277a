"""What stands before the tensors of a GGUF file, versions 2 and 3. No tensors, no model.

Numbers are little-endian: "GGUF", version u32, tensors u64, fields u64; fields as key, type u32,
value; tensors as name, dimensions u32, each u64 (the fastest first), type u32, offset u64 from
where the data begin, which `general.alignment` divides (ggml's docs/gguf.md).
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from moestro.engine.facts import ModelRefused

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
DEFAULT_ALIGNMENT = 32
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
MOST_DIMENSIONS = 4
BIG_ENDIAN = tuple(version << 24 for version in VERSIONS)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    path: Path
    name: str
    shape: tuple[int, ...]  # as in torch, the fastest last
    kind: int  # ggml's number of its type
    offset_bytes: int  # in the file


@dataclass(frozen=True, slots=True)
class Header:
    """Arrays of texts are in `fields` by their length alone."""

    path: Path
    fields: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @property
    def architecture(self) -> str:
        """Of the first part. Raises ModelRefused where the file has none."""
        found = self.fields.get(ARCHITECTURE)
        if not isinstance(found, str):
            raise ModelRefused(
                f"{self.path}: the field {ARCHITECTURE} is missing; it is no model's file"
            )
        return found

    def whole(self, key: str, default: int) -> int:
        """Raises ModelRefused for what is no number from 0 on."""
        found = self.fields.get(key, default)
        if type(found) is not int or found < 0:
            raise ModelRefused(f"{self.path}: {key} is {found!r}, and must be a whole number")
        return found


def is_gguf(path: Path) -> bool:
    """By its name alone."""
    return path.name.lower().endswith(".gguf")


def read_header(path: Path) -> Header:
    """Raises ModelRefused for what is no GGUF, cut off or damaged; OSError.

    Whether the tensors lie inside the file is not looked at: their types say how long they are.
    """
    with path.open("rb") as file:
        reading = _Reading(path, file, path.stat().st_size)
        tensors, fields = reading.start()
        found = {}
        for _ in range(fields):
            key = reading.text("a field's name")
            found[key] = reading.value(key, reading.number("I", key))
        entries = [reading.entry() for _ in range(tensors)]
        position = file.tell()
    twice = [name for name, count in Counter(name for name, *_ in entries).items() if count > 1]
    if twice:
        raise ModelRefused(f"{path} is damaged: it has two tensors {twice[0]}; fetch it again")
    step = Header(path, found, ()).whole(ALIGNMENT, DEFAULT_ALIGNMENT)
    if step < 1:
        raise ModelRefused(f"{path}: {ALIGNMENT} is {step}, and must be above 0")
    start = -(-position // step) * step
    placed = tuple(
        Entry(path, name, shape, kind, start + offset) for name, shape, kind, offset in entries
    )
    return Header(path, found, placed)


class _Reading:
    """One pass over the bytes; whatever would go beyond the file is refused before it is read."""

    def __init__(self, path: Path, file: BinaryIO, size_bytes: int) -> None:
        self._path = path
        self._file = file
        self._size_bytes = size_bytes

    def start(self) -> tuple[int, int]:
        """(tensors, fields)."""
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ModelRefused(f"{self._path} is no GGUF file: it does not begin with GGUF")
        version = self.number("I", "its version")
        if version in BIG_ENDIAN:
            raise ModelRefused(
                f"{self._path} is a GGUF file for big-endian machines; fetch the other one"
            )
        if version not in VERSIONS:
            raise ModelRefused(
                f"{self._path} is of version {version} of GGUF; read are"
                f" {' and '.join(map(str, VERSIONS))}"
            )
        return self.number("Q", "the number of tensors"), self.number("Q", "the number of fields")

    def number(self, kind: str, what: str) -> Any:
        return self._numbers(kind, 1, what)[0]

    def text(self, what: str) -> str:
        data = self._bytes(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelRefused(f"{self._path}: {what} is no UTF-8 text; fetch it again") from error

    def value(self, key: str, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], key)
        if kind == TEXT:
            return self.text(key)
        if kind != ARRAY:
            raise self._damaged(f"the field {key} is of the unknown type {kind}")
        inner, count = self.number("I", key), self.number("Q", key)
        if inner in NUMBERS:
            return list(self._numbers(NUMBERS[inner], count, key))
        if inner != TEXT:
            raise self._damaged(f"the field {key} is an array of the unknown type {inner}")
        for _ in range(count):
            self._skip(self.number("Q", key), key)
        return count

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape as in torch, type, offset from the data's start)."""
        name = self.text("a tensor's name")
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed(self._numbers("Q", dimensions, name)))
        if prod(shape) == 0:
            raise self._damaged(f"the tensor {name} has the shape {shape}")
        return name, shape, self.number("I", name), self.number("Q", name)

    def _numbers(self, kind: str, count: int, what: str) -> tuple[Any, ...]:
        length = count * struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{count}{kind}", self._bytes(length, what))

    def _bytes(self, length: int, what: str) -> bytes:
        self._fits(length, what)
        return self._file.read(length)

    def _skip(self, length: int, what: str) -> None:
        self._fits(length, what)
        self._file.seek(length, 1)

    def _fits(self, length: int, what: str) -> None:
        if length > self._size_bytes - self._file.tell():
            raise self._damaged(f"it ends, after {self._size_bytes} bytes, inside {what}")

    def _damaged(self, words: str) -> ModelRefused:
        return ModelRefused(f"{self._path} is cut off or damaged: {words}; fetch it again")
