"""The pack file: every expert of a model in one codec, ready to be read straight into slots.

    bytes 0..23   magic, format version, crc32 of the header, length of the header
    then          header: JSON with spec, offsets and the crc32 of every blob (8 hex digits each)
    then          zeros up to a page, then the blobs (see layout.py)

A pack is written once and never changed (build.py).
"""

import errno
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moestro.cache.facts import (
    PAGE_BYTES,
    PLAIN_ORDER,
    BlobLayout,
    PackInvalid,
    PackLayer,
    PackSpec,
    ReadFailed,
    human_bytes,
    round_up,
)

from .blobfile import BlobFile, page_memory

MAGIC = b"moestro\n"
FORMAT_VERSION = 1
VERIFY_AT_ONCE_BYTES = 1 << 30  # above this a start would wait too long: checked as they are read
# Says nothing about the file: memory or descriptors are short, or the reader asked wrongly.
_READERS_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINVAL)
_PREAMBLE = struct.Struct("<8sIIQ")
_CHUNK_BYTES = 8 << 20
_CHECKSUM_DIGITS = 8

# What a pack is of, and what is wrong with it where that differs, the gravest first.
_IDENTITY = {
    "model": "of another model",
    "order": "its matrices lie in another order",
    "codec": "in another codec",
}

Checksums = list[list[int]]  # [layer][expert]


def encode_header(spec: PackSpec, checksums: Checksums) -> bytes:
    """Preamble, JSON and padding. Its length depends on `spec` alone, not on the checksums."""
    header = _describe(spec)
    for layer, sums in zip(header["layers"], checksums, strict=True):
        layer["checksums"] = encode_checksums(sums)
    text = json.dumps(header, separators=(",", ":")).encode()
    preamble = _PREAMBLE.pack(MAGIC, FORMAT_VERSION, zlib.crc32(text), len(text))
    whole = preamble + text
    return whole.ljust(round_up(len(whole), PAGE_BYTES), b"\0")


def encode_checksums(sums: Sequence[int]) -> str:
    return "".join(f"{value:0{_CHECKSUM_DIGITS}x}" for value in sums)


def decode_checksums(digits: str) -> list[int]:
    step = _CHECKSUM_DIGITS
    return [int(digits[at : at + step], 16) for at in range(0, len(digits), step)]


def header_bytes(spec: PackSpec) -> int:
    return len(encode_header(spec, [[0] * layer.num_experts for layer in spec.layers]))


def layer_starts(spec: PackSpec) -> list[int]:
    """Offset of each layer's first blob from the first blob of the pack."""
    starts, end = [], 0
    for layer in spec.layers:
        starts.append(end)
        end += layer.total_bytes
    return starts


class Pack:
    """An open pack that was found valid for `spec`."""

    def __init__(self, file: BlobFile, spec: PackSpec, checksums: Checksums) -> None:
        self.file = file
        self.spec = spec
        first = file.size_bytes - spec.total_bytes
        self._starts = [first + start for start in layer_starts(spec)]
        self._offsets = [layer.offsets for layer in spec.layers]
        self._checksums = checksums
        self._unproved: list[list[int | None]] = [list(sums) for sums in checksums]
        self._doubted = False

    @classmethod
    def open(
        cls,
        path: Path,
        spec: PackSpec,
        *,
        verify_up_to_bytes: int = VERIFY_AT_ONCE_BYTES,
        direct: bool = True,
    ) -> "Pack":
        """Blobs are checked here when there are at most `verify_up_to_bytes` of them.

        Raises PackInvalid with the reason: missing, foreign, of another spec, truncated, corrupt;
        ReadFailed where it may well be good, and only cannot be read now.
        """
        try:
            file = BlobFile(path, direct=direct)
        except OSError as error:
            if error.errno in _READERS_FAULT:
                raise ReadFailed(f"cannot read {path}: {error.strerror}") from error
            raise PackInvalid(f"unreadable: {error.strerror}") from error
        valid = False
        try:
            pack = cls(file, spec, _read_header(file, spec))
            if spec.total_bytes <= verify_up_to_bytes:
                pack._verify_all()
            valid = True
        except ReadFailed as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _READERS_FAULT:
                raise
            raise PackInvalid(f"unreadable: {error}") from error
        finally:
            if not valid:
                file.close()
        return pack

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def direct(self) -> bool:
        """Reads go past the page cache."""
        return self.file.direct

    def offset(self, layer: int, expert: int) -> int:
        """Where the blob begins in the file; a multiple of a page."""
        return self._starts[layer] + self._offsets[layer][expert]

    def unproved(self, layer: int) -> Sequence[int | None]:
        """The crc32 that each blob must have, while nobody has compared it yet; or in doubt."""
        return self._checksums[layer] if self._doubted else self._unproved[layer]

    def proved(self, layer: int, experts: Iterable[int]) -> None:
        """The blobs were read and their checksums were right: do not compare them again."""
        sums = self._unproved[layer]
        for expert in experts:
            sums[expert] = None

    def doubt(self) -> None:
        """A read failed or brought other bytes: from now on every read is compared, each time.

        Whoever notices says so, from any thread; there is no way back.
        """
        self._doubted = True

    def _verify_all(self) -> None:
        for index, layer in enumerate(self.spec.layers):
            prove_layer(self.file, self.offset(index, 0), layer, self._unproved[index])
            self._unproved[index] = [None] * layer.num_experts

    def close(self) -> None:
        self.file.close()


def prove(blob: memoryview, checksum: int | None, layer: str, expert: int) -> None:
    """Raises PackInvalid unless `blob` (a whole stride) has `checksum`; None is not compared."""
    if checksum is not None and zlib.crc32(blob) != checksum:
        raise PackInvalid(f"corrupt: expert {expert} of {layer} does not match its checksum")


def prove_layer(
    file: BlobFile, start: int, layer: PackLayer, checksums: Sequence[int | None]
) -> None:
    """Reads the blobs of `layer`, which begin at `start`. Raises PackInvalid or ReadFailed."""
    memory = memoryview(page_memory(max(_CHUNK_BYTES, layer.layout.stride_bytes)))
    for run in layer.runs(_CHUNK_BYTES):
        first, end = layer.offsets[run.start], layer.offsets[run.stop]
        file.read_into(start + first, [memory[: end - first]])
        for expert in run:
            found = memory[layer.offsets[expert] - first : layer.offsets[expert + 1] - first]
            prove(found, checksums[expert], layer.name, expert)


def _describe(spec: PackSpec) -> dict[str, Any]:
    """The header without checksums: equal for equal specs."""
    order = {} if spec.order == PLAIN_ORDER else {"order": spec.order}
    return {
        "model": spec.model,
        **order,
        "codec": spec.codec,
        "checksum": "crc32",
        "layers": [
            _describe_layer(layer, start)
            for layer, start in zip(spec.layers, layer_starts(spec), strict=True)
        ],
    }


def _describe_layer(layer: PackLayer, start: int) -> dict[str, Any]:
    """In a mixed layer: the different layouts, and for each expert the place of its own."""
    found: dict[str, Any] = {
        "name": layer.name,
        "num_experts": layer.num_experts,
        "offset_bytes": start,
    }
    if not layer.each:
        return found | _describe_layout(layer.layout)
    place = {layout: number for number, layout in enumerate(layer.kinds)}
    return found | {
        "layouts": [_describe_layout(layout) for layout in layer.kinds],
        "layout_of": [place[layout] for layout in layer.each],
    }


def _describe_layout(layout: BlobLayout) -> dict[str, Any]:
    return {
        "stride_bytes": layout.stride_bytes,
        "tensors": [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset_bytes": offset}
            for t, offset in zip(layout.tensors, layout.offsets, strict=True)
        ],
    }


def _read_header(file: BlobFile, spec: PackSpec) -> Checksums:
    """The checksums of a header that is whole and describes exactly `spec`."""
    expected = header_bytes(spec)
    if file.size_bytes < PAGE_BYTES:
        raise PackInvalid(f"truncated: {file.size_bytes} bytes are no pack")
    start = memoryview(page_memory(PAGE_BYTES))
    file.read_into(0, [start])
    magic, version, checksum, length = _PREAMBLE.unpack_from(start)
    if magic != MAGIC:
        raise PackInvalid("foreign: not a pack of moestro")
    if version != FORMAT_VERSION:
        raise PackInvalid(f"foreign: format {version}, not {FORMAT_VERSION}")
    region = round_up(_PREAMBLE.size + length, PAGE_BYTES)
    if region > file.size_bytes:
        raise PackInvalid("truncated: the file ends inside its header")
    whole = memoryview(page_memory(region))
    file.read_into(0, [whole])
    text = bytes(whole[_PREAMBLE.size : _PREAMBLE.size + length])
    if zlib.crc32(text) != checksum:
        raise PackInvalid("corrupt: the header does not match its checksum")
    try:
        checksums = _match(json.loads(text), spec)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PackInvalid(f"foreign: its header is not one of a pack: {error}") from error
    if file.size_bytes != expected + spec.total_bytes:
        raise PackInvalid(
            f"truncated: {human_bytes(file.size_bytes)} ({file.size_bytes} bytes) instead of "
            f"{expected + spec.total_bytes} bytes"
        )
    return checksums


def _match(header: dict[str, Any], spec: PackSpec) -> Checksums:
    """Takes the checksums out of a parsed header; raises PackInvalid if the rest is not `spec`."""
    wanted = _describe(spec)
    for name, words in _IDENTITY.items():
        unsaid = PLAIN_ORDER if name == "order" else None
        found, own = header.get(name, unsaid), wanted.get(name, unsaid)
        if found != own:
            raise PackInvalid(f"foreign: {words} ({found!r}, not {own!r})")
    digits: Sequence[str] = [layer.pop("checksums", "") for layer in header["layers"]]
    if header != wanted:
        raise PackInvalid("foreign: its layers or tensors are laid out differently")
    checksums = [decode_checksums(line) for line in digits]
    if [len(sums) for sums in checksums] != [layer.num_experts for layer in spec.layers]:
        raise ValueError("other numbers of checksums than of experts")
    return checksums
