import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cache import BlobLayout, Pack, PackInvalid, PackLayer, PackSpec
from moestro.cache.pack.blobfile import page_memory
from moestro.cache.pack.file import header_bytes, prove
from moestro.cache.pack.views import blob_views
from tiny_packs import build_tiny, layer_tensors, tiny_spec


@pytest.fixture
def path(tmp_path: Path, spec: PackSpec) -> Path:
    path = tmp_path / "made.pack"
    build_tiny(path, spec).close()
    return path


@pytest.mark.parametrize("direct", [True, False])
def test_every_tensor_comes_back(path: Path, spec: PackSpec, direct: bool) -> None:
    pack = Pack.open(path, spec, direct=direct)
    for index, layer in enumerate(spec.layers):
        wanted = layer_tensors(spec, index)
        for expert in range(layer.num_experts):
            memory = page_memory(layer.layout.stride_bytes)
            pack.file.read_into(pack.offset(index, expert), [memoryview(memory)])
            found = blob_views(torch.frombuffer(memory, dtype=torch.uint8), 0, layer.layout)
            for name, tensor in found.items():
                assert torch.equal(tensor, wanted[name][expert])
    pack.close()


def test_direct_and_buffered_reads_give_equal_bytes(path: Path, spec: PackSpec) -> None:
    found = []
    for direct in (True, False):
        pack = Pack.open(path, spec, direct=direct)
        memory = memoryview(page_memory(spec.total_bytes))
        pack.file.read_into(header_bytes(spec), [memory])
        found.append(bytes(memory))
        pack.close()
    assert found[0] == found[1] == path.read_bytes()[header_bytes(spec) :]


def test_neighbours_touch_and_blobs_begin_at_pages(path: Path, spec: PackSpec) -> None:
    pack = Pack.open(path, spec)
    at = header_bytes(spec)
    for index, layer in enumerate(spec.layers):
        for expert in range(layer.num_experts):
            assert pack.offset(index, expert) == at
            assert at % 4096 == 0
            at += layer.layout.stride_bytes
    assert at == path.stat().st_size
    pack.close()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(4096))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.unlink(), "unreadable: No such file"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"\0" * 8192), "foreign: not a pack"),
        (lambda path: path.write_bytes(path.read_bytes()[:4000]), "truncated"),
        (lambda path: flip(path, 0), "foreign: not a pack"),
        (lambda path: flip(path, 8), "foreign: format"),
        (lambda path: flip(path, 100), "corrupt: the header"),
        (lambda path: flip(path, 22), "truncated: the file ends inside its header"),
        (shorten, "truncated"),
        (lengthen, "truncated"),
        (lambda path: flip(path, -5000), r"corrupt: expert 5 of layers\.2"),
        (lambda path: flip(path, -1), "corrupt: expert 5"),
        (lambda path: (path.unlink(), path.mkdir()), "unreadable"),
    ],
)
def test_damage_is_found_and_named(
    path: Path, spec: PackSpec, damage: Callable[[Path], object], why: str
) -> None:
    damage(path)
    with pytest.raises(PackInvalid, match=why):
        Pack.open(path, spec)


def test_every_flipped_byte_of_a_blob_is_found(path: Path, spec: PackSpec) -> None:
    first = header_bytes(spec)
    for at in range(first, first + 4096, 97):
        flip(path, at)
        with pytest.raises(PackInvalid, match=r"expert 0 of layers\.0"):
            Pack.open(path, spec)
        flip(path, at)
    Pack.open(path, spec).close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda spec: replace(spec, model="other"), "another model"),
        (lambda spec: replace(spec, codec="int8"), "another codec"),
        (
            lambda spec: replace(spec, codec="int8-tiles", order="tiles"),
            r"matrices lie in another order \('rows', not 'tiles'\)",
        ),
        (lambda spec: tiny_spec(6, 6), "laid out differently"),
        (lambda spec: tiny_spec(6, 6, 7), "laid out differently"),
        (
            lambda spec: replace(
                spec,
                layers=(
                    *spec.layers[:2],
                    PackLayer(spec.layers[2].name, 6, BlobLayout.of({"u": ("int8", (5000,))})),
                ),
            ),
            "laid out differently",
        ),
    ],
)
def test_a_pack_of_another_spec_is_foreign(
    path: Path, spec: PackSpec, change: Callable[[PackSpec], PackSpec], why: str
) -> None:
    with pytest.raises(PackInvalid, match=why):
        Pack.open(path, change(spec))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [],
        lambda header: header | {"layers": None},
        lambda header: header | {"layers": ["x"]},
        lambda header: header | {"layers": [x | {"checksums": 7} for x in header["layers"]]},
        lambda header: header | {"layers": [x | {"checksums": "zz"} for x in header["layers"]]},
        lambda header: header | {"layers": [x | {"checksums": "00"} for x in header["layers"]]},
    ],
)
def test_a_header_that_says_something_else_is_refused(
    path: Path, spec: PackSpec, change: Callable[[dict[str, Any]], object]
) -> None:
    """Even one whose own checksum is right."""
    whole = path.read_bytes()
    length = struct.unpack_from("<Q", whole, 16)[0]
    text = json.dumps(change(json.loads(whole[24 : 24 + length]))).encode()
    preamble = struct.pack("<8sIIQ", whole[:8], 1, zlib.crc32(text), len(text))
    path.write_bytes((preamble + text).ljust(header_bytes(spec), b"\0"))
    with pytest.raises(PackInvalid, match="foreign: its header is not one of a pack"):
        Pack.open(path, spec)


def test_a_big_pack_is_not_read_when_opened(path: Path, spec: PackSpec) -> None:
    flip(path, -1)
    pack = Pack.open(path, spec, verify_up_to_bytes=spec.total_bytes - 1)
    assert pack.unproved(2)[5] is not None
    memory = memoryview(page_memory(spec.layers[2].layout.stride_bytes))
    pack.file.read_into(pack.offset(2, 5), [memory])
    with pytest.raises(PackInvalid, match="expert 5"):
        prove(memory, pack.unproved(2)[5], "there", 5)
    pack.proved(2, [5])
    assert pack.unproved(2)[5] is None
    pack.close()
