"""Experts of one model in several formats: the map, the arithmetic, and a whole model of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from engine_kit import opened, run_logits
from moestro.cache import Phase
from moestro.engine import EngineConfig, FormatMap, StartError, mix_by_trace, plan_model
from moestro.engine.formats.experts_module import ExpertsModule
from moestro.engine.formats.mixed import MixedCodec
from moestro.engine.formats.named import codec_of

LAYER = "model.layers.{}.mlp.experts"
EXPERTS, OUT, IN = 6, 64, 32
STEPS: list[list[tuple[int, list[int]]]] = [
    [(1, list(range(10, 40))), (2, list(range(60, 65)))],
    [(1, [7]), (2, [9])],
    *[[(1, [5 + i]), (2, [90 + i]), (3, [130 + i])] for i in range(4)],
    *[[(1, [50 + i])] for i in range(4)],
]


def write(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps({"moestro_formats": 1, "default": "int8", "layers": {}} | fields))
    return path


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"moestro_formats": 2}, "format 2, not 1"),
        ({"default": "int3"}, "'int3' is none of native, int8, int4"),
        ({"layers": {"x": {"other": [1]}}}, "'other' is none of"),
        ({"layers": {"x": {"native": [1, 1]}}}, "1 is no expert, or named twice"),
        ({"layers": {"x": {"native": [1], "int8": [1]}}}, "1 is no expert, or named twice"),
        ({"layers": {"x": {"native": [-1]}}}, "-1 is no expert"),
        ({"layers": {"x": {"native": ["1"]}}}, "'1' is no expert"),
        ({"layers": {"x": {"native": [True]}}}, "True is no expert"),
        ({"layers": {"x": {"native": 1}}}, "not a map of formats"),
        ({"layers": [1]}, "not a map of formats"),
    ],
)
def test_a_map_that_is_none_is_refused(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(StartError, match=why):
        FormatMap.read(write(tmp_path / "map.json", **fields))


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", "[" * 100_000])
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(StartError, match="--expert-format mixed:.*not a map of formats"):
        FormatMap.read(tmp_path / "map.json")


def test_a_map_is_written_as_it_is_read(tmp_path: Path) -> None:
    one = FormatMap("int8", {"x": {"native": [1, 3]}})
    one.write(tmp_path / "map.json")
    other = FormatMap.read(tmp_path / "map.json")
    assert other == one and other.digest == one.digest
    assert FormatMap("int8", {"x": {"native": [1, 2]}}).digest != one.digest
    assert one.of("x", 4) == ["int8", "native", "int8", "native"]
    assert one.of("y", 2) == ["int8", "int8"]


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ({"model.layers.9.mlp.experts": {"native": [0]}}, "no experts at 'model.layers.9"),
        ({LAYER.format(1): {"native": [8]}}, "names expert 8 of .*, which has 8"),
    ],
)
def test_a_map_of_another_model_is_refused(tmp_path: Path, layers: Any, why: str) -> None:
    folder, path = tiny.build("mixtral", tmp_path / "m"), write(tmp_path / "f", layers=layers)
    with (
        pytest.raises(StartError, match=why),
        opened(folder, tmp_path / "cache", expert_format=f"mixed:{path}"),
    ):
        pass


def module(transposed: bool) -> tuple[ExpertsModule, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
    tensors = {
        "up_proj": torch.randn(shape, dtype=torch.bfloat16),
        "up_proj_bias": torch.randn(EXPERTS, OUT, dtype=torch.bfloat16),
    }
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return ExpertsModule("x", EXPERTS, kinds, kinds, (), transposed), tensors


MAP = FormatMap("int8", {"x": {"native": [1, 2], "int4": [3, 5]}})


def blobs(codec: MixedCodec, transposed: bool) -> list[dict[str, torch.Tensor]]:
    """The tensors of every expert, as its slot would show them."""
    entry, tensors = module(transposed)
    layer, kinds = codec.pack_layer(entry), codec.encode_kinds(entry, tensors)
    rows, found = [0] * len(kinds), []
    for expert in range(EXPERTS):
        kind = layer.kinds.index(layer.layout_of(expert))
        assert [t.name for t in layer.layout_of(expert).tensors] == list(kinds[kind])
        found.append({name: tensor[rows[kind]] for name, tensor in kinds[kind].items()})
        rows[kind] += 1
    return found


@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert_is_kept_and_multiplied_by_its_own_codec(transposed: bool) -> None:
    codec = MixedCodec(MAP, torch.float32)
    _, tensors = module(transposed)
    whole = torch.randn(9, IN)
    places = torch.tensor([7, 1, 2])
    for expert, (name, blob) in enumerate(
        zip(MAP.of("x", 6), blobs(codec, transposed), strict=True)
    ):
        alone = codec_of(name, torch.float32)
        packed = {key: tensor[expert] for key, tensor in alone.encode(tensors, transposed).items()}
        assert all(torch.equal(blob[key], tensor) for key, tensor in packed.items())
        matrix = codec.open(blob, "up_proj", transposed)
        wanted = alone.multiply(alone.begin(whole), alone.open(packed, "up_proj", transposed))
        assert torch.equal(codec.multiply(codec.begin(whole), matrix), wanted)
        taken = codec.multiply(codec.take(codec.begin(whole), places), matrix)
        assert torch.allclose(taken, wanted[places], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "spans",
    [
        [(place, place + 1) for place in range(6)],
        [(0, 2), (2, 3), (3, 6), (6, 7), (7, 8), (8, 9)],
        [(0, 4), (4, 5), (5, 5), (5, 6), (6, 9), (9, 9)],
    ],
)
def test_products_of_several_formats_at_once_are_those_alone(
    spans: list[tuple[int, int]],
) -> None:
    codec = MixedCodec(MAP, torch.float32)
    matrices = [codec.open(blob, "up_proj", False) for blob in blobs(codec, False)]
    rows = torch.randn(spans[-1][1], IN)
    found = codec.multiply_each(codec.begin(rows), spans, matrices)
    below = 0
    for (start, end), matrix in zip(spans, matrices, strict=True):
        part = codec.begin(rows[start:end])
        wanted = codec.multiply_each(part, [(0, end - start)], [matrix])
        assert torch.equal(found[below : below + end - start], wanted)
        below += end - start
    assert len(found) == below


@pytest.mark.parametrize("width", [1, 6])
def test_one_row_through_several_formats_is_as_through_each(width: int) -> None:
    codec = MixedCodec(MAP, torch.float32)
    matrices = [codec.open(blob, "up_proj", False) for blob in blobs(codec, False)]
    rows = codec.begin(torch.randn(width, IN))
    found = codec.multiply_apart(rows, matrices)
    assert len(found) == len(matrices) == 6
    for place, matrix in enumerate(matrices):
        row = codec.take(rows, torch.tensor([place % width]))
        assert torch.equal(found[place : place + 1], codec.multiply_apart(row, [matrix]))


def half(default: str, other: str) -> dict[str, Any]:
    """Every second expert of the first three layers in another format; the last layer plain."""
    layers = {LAYER.format(n): {other: list(range(n % 2, 8, 2))} for n in range(3)}
    return {"default": default, "layers": layers}


def named(name: str, other: str) -> dict[str, Any]:
    """All experts named, by which the default is of no use."""
    return {"default": other, "layers": {LAYER.format(n): {name: list(range(8))} for n in range(4)}}


@pytest.mark.parametrize("name", ["native", "int8", "int4", "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_all_in_one_format_is_that_format(tmp_path: Path, name: str, family: str) -> None:
    folder = tiny.build(family, tmp_path / "m", torch.bfloat16)
    path = write(tmp_path / "f", **named(name, "int8" if name == "native" else "native"))
    with opened(folder, tmp_path / "cache", expert_format=name) as loaded:
        wanted = run_logits(loaded, STEPS)
    with opened(folder, tmp_path / "cache", expert_format=f"mixed:{path}") as loaded:
        assert torch.equal(run_logits(loaded, STEPS), wanted)


@pytest.mark.parametrize(
    ("family", "default", "other"),
    [
        pytest.param("mixtral", "int8", "native", marks=pytest.mark.slow),
        pytest.param("mixtral", "int4", "int8", marks=pytest.mark.slow),
        ("gpt_oss", "int8", "native"),
    ],
)
def test_a_mixed_model_is_the_same_in_any_cache(
    tmp_path: Path, family: str, default: str, other: str
) -> None:
    folder = tiny.build(family, tmp_path / "m", torch.bfloat16)
    path, cache = write(tmp_path / "f", **half(default, other)), tmp_path / "cache"
    found, read = {}, {}
    for slots in (32, 8, 2):
        with opened(folder, cache, expert_format=f"mixed:{path}") as loaded:
            blob = loaded.cache.plan.slot_bytes
        settings: dict[str, Any] = {"host_memory_bytes": slots * blob, "prefetch": slots == 8}
        with opened(folder, cache, expert_format=f"mixed:{path}", **settings) as loaded:
            before = loaded.cache.stats()
            found[slots] = run_logits(loaded, STEPS)
            after = loaded.cache.stats()
            read[slots] = after.loaded_bytes - before.loaded_bytes
            assert after.loaded_bytes < after.loads * blob
            assert loaded.info.expert_format == "mixed"
    assert torch.equal(found[32], found[8]) and torch.equal(found[32], found[2])
    assert read[2] > read[32]
    errors = {}
    for name in ("native", "int8"):
        with opened(folder, cache, expert_format=name) as loaded:
            errors[name] = (run_logits(loaded, STEPS) - found[32]).norm()
    assert errors["native"] > 0 and errors["int8"] > 0
    names = {pack.name for pack in cache.rglob("*.pack")}
    assert names == {"mixed.pack", "native.pack", "int8.pack"}


def test_another_map_replaces_the_pack(tmp_path: Path) -> None:
    folder, cache = tiny.build("mixtral", tmp_path / "m"), tmp_path / "cache"
    sizes = []
    for number, fields in enumerate((half("int8", "native"), half("native", "int8"))):
        path = write(tmp_path / f"{number}", **fields)
        with opened(folder, cache, expert_format=f"mixed:{path}") as loaded:
            sizes.append(loaded.cache.spec.total_bytes)
            for layer, entry in enumerate(loaded.cache.spec.layers):
                with loaded.cache.acquire(layer, list(range(8)), Phase.DECODE) as lease:
                    for expert, tensors in lease:
                        assert list(tensors) == [t.name for t in entry.layout_of(expert).tensors]
        (pack,) = cache.rglob("*.pack")
        assert sizes[-1] < pack.stat().st_size < sizes[-1] + 16384
    assert sizes[0] < sizes[1]


def test_a_plan_counts_the_average_blob(tmp_path: Path) -> None:
    folder, cache = tiny.build("mixtral", tmp_path / "m"), tmp_path / "cache"
    found = {}
    path = write(tmp_path / "f", **half("int8", "native"))
    for name in ("native", "int8", f"mixed:{path}"):
        config = EngineConfig(
            folder, cache, expert_format=name, host_memory_bytes=400_000, threads=1
        )
        found[name] = plan_model(config, 1e9, None)
    native, int8, mixed = (forecast.work.layers[0].blob_bytes for forecast in found.values())
    assert int8 < mixed == (native + int8) // 2 < native
    assert found[f"mixed:{path}"].expert_format == "mixed"


def test_the_most_asked_for_become_fine(tmp_path: Path) -> None:
    layers = [{"name": f"l{n}", "num_experts": 4, "stride_bytes": 4096} for n in range(2)]
    events = [[0, "p", 0, [0, 1]], [0, "p", 1, [3]], [1, "d", 0, [1]], [1, "d", 1, [3, 2]]]
    lines = [{"moestro_trace": 1, "model": "m", "layers": layers}, *events]
    path = tmp_path / "trace"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = mix_by_trace(path, "native", "int8", 0.25)
    assert found == FormatMap("int8", {"l0": {"native": [1]}, "l1": {"native": [3]}})
    assert mix_by_trace(path, "native", "int8", 0.0).layers == {}
    # Who was never asked for stays coarse, however large the share.
    everyone = mix_by_trace(path, "native", "int8", 1.0)
    assert everyone.layers == {"l0": {"native": [0, 1]}, "l1": {"native": [2, 3]}}
    with pytest.raises(StartError, match="No such file"):
        mix_by_trace(tmp_path / "none", "native", "int8", 0.5)


def test_a_missing_map_is_refused(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "m")
    with (
        pytest.raises(StartError, match="--expert-format mixed:.*none: No such file"),
        opened(folder, tmp_path / "cache", expert_format=f"mixed:{tmp_path / 'none'}"),
    ):
        pass
