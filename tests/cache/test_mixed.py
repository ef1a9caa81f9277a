"""A layer whose experts differ in layout: packed, resumed, read, counted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import (
    BlobLayout,
    ExpertCache,
    Pack,
    PackInvalid,
    PackLayer,
    PackWriter,
    Phase,
    open_or_build,
    plan_slots,
)
from moestro.cache.pack.blobfile import page_memory
from moestro.cache.pack.file import encode_header, header_bytes
from moestro.cache.pack.views import blob_views
from tiny_packs import LARGE, LOG, SMALL, assert_is, build_tiny, layer_tensors, mixed_spec

SPEC = mixed_spec(6, 6, 6)
SIZES = {SMALL: 4096, LARGE: 8192}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mixed.pack"


@given(st.lists(st.sampled_from([SMALL, LARGE]), min_size=1, max_size=30), st.integers(1, 40_000))
def test_the_arithmetic_of_a_layer(layouts: list[BlobLayout], most_bytes: int) -> None:
    layer = PackLayer.of("x", layouts)
    assert [layer.layout_of(expert) for expert in range(len(layouts))] == layouts
    assert layer.strides == tuple(SIZES[layout] for layout in layouts)
    assert layer.total_bytes == layer.offsets[-1] == sum(layer.strides)
    assert set(layer.kinds) == set(layouts)
    assert layer.layout.stride_bytes == max(layer.strides)
    runs = list(layer.runs(most_bytes))
    assert [expert for run in runs for expert in run] == list(range(len(layouts)))
    for run, following in zip(runs, [*runs[1:], range(0)], strict=True):
        size = layer.offsets[run.stop] - layer.offsets[run.start]
        assert size <= most_bytes or len(run) == 1
        if following:  # none is shorter than it must be
            assert size + layer.strides[following.start] > most_bytes


def test_a_layer_of_one_layout_is_not_mixed() -> None:
    assert PackLayer.of("x", [SMALL] * 3) == PackLayer("x", 3, SMALL)


def test_every_tensor_comes_back_and_no_byte_between_blobs(path: Path) -> None:
    pack = build_tiny(path, SPEC)
    at = header_bytes(SPEC)
    for index, layer in enumerate(SPEC.layers):
        for expert in range(layer.num_experts):
            assert pack.offset(index, expert) == at
            at += layer.strides[expert]
            memory = page_memory(layer.strides[expert])
            pack.file.read_into(pack.offset(index, expert), [memoryview(memory)])
            flat = torch.frombuffer(memory, dtype=torch.uint8)
            assert_is(blob_views(flat, 0, layer.layout_of(expert)), SPEC, index, expert)
    assert at == path.stat().st_size
    pack.close()


def test_the_header_says_which() -> None:
    text = encode_header(SPEC, [[0] * 6] * 3)
    layers = json.loads(text[24:].rstrip(b"\0"))["layers"]
    assert layers[0]["layout_of"] == [0, 1, 1, 0, 0, 0]
    assert [kind["stride_bytes"] for kind in layers[0]["layouts"]] == [4096, 8192]
    assert layers[1]["layout_of"] == [0, 0, 1, 1, 1, 1]  # kinds come in the order of experts


def test_another_mixture_is_another_pack(path: Path) -> None:
    build_tiny(path, SPEC).close()
    first = SPEC.layers[0]
    swapped = PackLayer.of(first.name, [LARGE, SMALL, *first.each[2:]])
    with pytest.raises(PackInvalid, match="laid out differently"):
        Pack.open(path, replace(SPEC, layers=(swapped, *SPEC.layers[1:])))


@pytest.mark.parametrize("expert", range(6))
def test_damage_names_the_expert(path: Path, expert: int) -> None:
    build_tiny(path, SPEC).close()
    layer, data = SPEC.layers[2], bytearray(path.read_bytes())
    data[len(data) - layer.total_bytes + layer.offsets[expert + 1] - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackInvalid, match=f"expert {expert} of layers.2"):
        Pack.open(path, SPEC)


def test_an_interrupted_build_is_resumed(path: Path) -> None:
    whole = path.with_name("whole.pack")
    build_tiny(whole, SPEC).close()

    class Stopped(Exception):
        pass

    def one(writer: PackWriter) -> None:
        writer.add_layer(0, *(layer_tensors(SPEC, 0, kind) for kind in (0, 1)))
        raise Stopped

    with pytest.raises(Stopped):
        open_or_build(path, SPEC, one, lambda: None, LOG)
    build_tiny(path, SPEC).close()
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kinds", [[0], [1, 0], [0, 1, 1]])
def test_a_layer_is_added_kind_by_kind(path: Path, kinds: list[int]) -> None:
    def fill(writer: PackWriter) -> None:
        writer.add_layer(0, *(layer_tensors(SPEC, 0, kind) for kind in kinds))

    with pytest.raises(ValueError, match=r"layers\.0.*the spec says"):
        open_or_build(path, SPEC, fill, lambda: None, LOG)


@pytest.mark.parametrize("slots", [2, 7, 18])
def test_loads_count_what_was_read(path: Path, slots: int) -> None:
    pack = build_tiny(path, SPEC)
    cache = ExpertCache(pack, plan_slots(slots * SPEC.slot_bytes, SPEC, 1))
    wanted = 0
    for layer, experts in ((0, [0]), (0, [1]), (1, [2]), (0, range(6)), (2, range(6))):
        before = cache.stats()
        here = {key.expert for key in cache._table.keys if key is not None and key.layer == layer}
        with cache.acquire(layer, list(experts), Phase.DECODE) as lease:
            for expert, tensors in lease:
                assert_is(tensors, SPEC, layer, expert)
        cache.check()
        loads = cache.stats().loads - before.loads
        assert loads == len(set(experts) - here)
        wanted += sum(SPEC.layers[layer].strides[expert] for expert in set(experts) - here)
    assert cache.stats().loaded_bytes == wanted
    cache.close()
