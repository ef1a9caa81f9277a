"""Checkpoints whose experts are kept in int4 or fp8 as they are: no weight is rounded again."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from engine_kit import logits_of
from moestro.cache import human_bytes
from moestro.engine.facts import EngineConfig, ModelRefused
from moestro.engine.forecasts import own_grid_line
from moestro.engine.formats import FormatMap, encode_layer, keeps_grids
from moestro.engine.kernels import TileFormat
from moestro.engine.planning import Sketch, inspect, plan_memory, understand
from moestro.engine.weights import Checkpoint
from quantized_files import BLOCK, GROUP, KINDS, edit_config, write_quantized
from tile_reference import decode

PROMPT = list(range(20, 50))
FORMS = {
    "gptq": TileFormat("int4", GROUP, "float16", "integer"),
    "gptq reordered": TileFormat("int4", GROUP, "float16", "integer"),
    "awq": TileFormat("int4", GROUP, "float16", "integer"),
    "packed int4": TileFormat("int4", GROUP, "float16", "none"),
    "packed int4 with zeros": TileFormat("int4", GROUP, "float16", "integer"),
    "fp8": TileFormat("fp8", BLOCK[1], "float32"),
    "fp8 of one scale": TileFormat("fp8", 0, "float32"),
    "fp8 rows": TileFormat("fp8", 0, "float32"),
}


def form_of(kind: str, inputs: int) -> TileFormat:
    """One group of a row is a whole row."""
    form = FORMS[kind]
    return replace(form, group=0) if form.group == inputs else form


SLOW = {"awq", "gptq reordered", "fp8 of one scale", "fp8 rows", "packed int4"}  # of a start each
SOME = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in FORMS]


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", FORMS)
def test_tiles_have_the_numbers_of_the_files(kind: str, family: str, tmp_path: Path) -> None:
    """Each weight to the bit, as the format's formula gives it in float32."""
    folder = tiny.build(family, tmp_path / "plain")
    twin = write_quantized(folder, tmp_path / "model", KINDS[kind])
    form = FORMS[kind]
    config = EngineConfig(tmp_path / "model", tmp_path, expert_format=form.kind)
    blueprint = inspect(config)
    entry, model = blueprint.experts[-1], blueprint.build_model()
    assert entry.grids.keys() == {"gate_up_proj", "down_proj"}
    for name, grid in entry.grids.items():
        assert grid == form_of(kind, entry.tensors[name][1][2])
    assert keeps_grids(blueprint.codec, entry)
    rest, codes = blueprint.checkpoint.load_codes(model, entry)
    (packed,) = encode_layer(blueprint.codec, entry, rest, codes)
    spec = blueprint.spec.layers[-1].layout
    assert {part.name for part in spec.tensors} == packed.keys()
    wanted = Checkpoint(twin).load_experts(model, entry)
    for name, whole in wanted.items():
        assert whole.dtype == torch.float32
        for expert in (0, len(whole) - 1):
            found = decode(packed[name][expert], entry.grids[name], *whole.shape[1:])
            if name in entry.orders:
                found = found[:, packed[f"{name}.order"][expert].argsort()]
            assert torch.equal(found, whole[expert]), (name, expert)
        # and the product knows in which order a tile has its inputs
        matrix = blueprint.codec.open({k: t[0] for k, t in packed.items()}, name, False)
        rows = torch.randn(5, whole.shape[2], generator=torch.Generator().manual_seed(4))
        answer, exact = blueprint.codec.multiply(rows, matrix), rows @ whole[0].T
        assert (answer - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("fp8", "mixtral"),
        pytest.param("gptq", "mixtral", marks=pytest.mark.slow),
        pytest.param("gptq reordered", "deepseek_v3", marks=pytest.mark.slow),
        pytest.param("fp8", "deepseek_v3", marks=pytest.mark.slow),
        pytest.param("fp8 rows", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("fp8 of one scale", "olmoe", marks=pytest.mark.slow),
        pytest.param("awq", "deepseek_v3", marks=pytest.mark.slow),
        pytest.param("packed int4", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("packed int4 with zeros", "olmoe", marks=pytest.mark.slow),
    ],
)
def test_it_is_served_like_stock_transformers(kind: str, family: str, tmp_path: Path) -> None:
    """fp8 is multiplied with as floats; int4 rounds the other side to int8, not the weights."""
    folder = tiny.build(family, tmp_path / "plain")
    twin = write_quantized(folder, tmp_path / "model", KINDS[kind])
    name = FORMS[kind].kind
    found = logits_of(tmp_path / "model", tmp_path / "cache", PROMPT, expert_format=name)
    with torch.inference_mode():
        wanted = tiny.oracle(twin)(torch.tensor([[*PROMPT, 7, 8]])).logits[0, len(PROMPT) - 1 :]
    limit = 1e-4 if name == "fp8" else 0.05 * float(wanted.abs().max())
    assert (found - wanted).abs().max() < limit
    again = logits_of(tmp_path / "model", tmp_path / "cache", PROMPT, expert_format=name)
    assert torch.equal(again, found)  # out of the pack that the first start left


@pytest.mark.parametrize("kind", SOME)
def test_the_config_alone_gives_the_same_pack(kind: str, tmp_path: Path) -> None:
    plain = tiny.build("mixtral", tmp_path / "plain", torch.float16)  # as scales of int4 are
    write_quantized(plain, tmp_path / "model", KINDS[kind])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "model" / "config.json", bare)
    for name in ("native", FORMS[kind].kind, "int8"):
        config = EngineConfig(tmp_path / "model", tmp_path, expert_format=name)
        sketched = understand(replace(config, model_path=bare), Sketch(bare))
        whole = inspect(config)
        assert sketched.spec.layers == whole.spec.layers
        parts = [
            plan_memory(config, each).parts() | {"interpreter": 0} for each in (whole, sketched)
        ]
        assert parts[0] == parts[1]


Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A mixtral in each kind, written when it is first asked for."""
    place = tmp_path_factory.mktemp("models")
    plain = tiny.build("mixtral", place / "plain")

    @cache
    def made(kind: str) -> Path:
        write_quantized(plain, place / kind, KINDS[kind])
        return place / kind

    return made


def line(model: Path, name: str) -> str:
    config = EngineConfig(model, model, expert_format=name)
    found = own_grid_line(config, inspect(config))
    assert found is not None and "\n" not in found
    return found


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("gptq", "int4", "int4 grid (groups of 32, float16 scales, integer zeros), kept as it is"),
        ("packed int4", "int4", "int4 grid (groups of 32, float16 scales), kept as it is"),
        ("fp8", "fp8", "fp8 grid (groups of 16, float32 scales), kept as it is"),
        ("fp8 rows", "fp8", "fp8 grid (whole rows, float32 scales), kept as it is"),
        ("fp8", "int4", "rounded again to int4; --expert-format fp8 would keep"),
        ("awq", "native", "decoded from awq to float32; --expert-format int4 would keep"),
        ("awq", "mixed", "rounded again to mixed; --expert-format int4 would keep"),
        ("gptq reordered", "int4", "integer zeros, inputs in act-order), kept as it is"),
        ("gptq v2, 8 bits", "int4", "rounded again to int4, because its numbers have 8 bits"),
        ("int8 rows", "fp8", "because its numbers lie on no grid of int4 or fp8"),
        ("gptq reordered", "native", "decoded from gptq to float32; --expert-format int4 would"),
    ],
)
def test_a_line_says_what_becomes_of_it(
    kind: str, name: str, words: str, models: Models, tmp_path: Path
) -> None:
    if name == "mixed":
        name = f"mixed:{tmp_path / 'map'}"
        FormatMap("int4", {}).write(tmp_path / "map")
    found = line(models(kind), name)
    assert found.startswith("experts: ") and words in found, found


def test_what_a_plain_checkpoint_is_kept_in_needs_no_line(tmp_path: Path) -> None:
    config = EngineConfig(tiny.build("mixtral", tmp_path / "plain"), tmp_path)
    assert own_grid_line(config, inspect(config)) is None


def test_the_size_that_is_promised_is_the_one_that_comes(models: Models) -> None:
    config = EngineConfig(models("gptq"), models("gptq"), expert_format="int4")
    assert human_bytes(inspect(config).spec.slot_bytes) in line(models("gptq"), "native")


@pytest.mark.slow
def test_experts_of_which_some_are_plain_are_decoded(tmp_path: Path) -> None:
    """A layer whose matrices are not all quantized is rounded, the others are kept."""
    some = replace(KINDS["gptq"], kept=(*KINDS["gptq"].kept, "layers.1.block_sparse_moe.experts.3"))
    write_quantized(tiny.build("mixtral", tmp_path / "plain"), tmp_path / "model", some)
    found = line(tmp_path / "model", "int4")
    assert "kept as it is in 3 of 4 layers; elsewhere decoded from gptq" in found
    assert found.endswith("because not all of them are quantized")
    logits = logits_of(tmp_path / "model", tmp_path / "cache", PROMPT, expert_format="int4")
    whole = logits_of(tmp_path / "model", tmp_path / "cache", PROMPT)
    assert 0 < (logits - whole).abs().max() < 0.05 * whole.abs().max()


def test_an_order_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    """Only when the groups are kept: decoding looks at each input's own."""
    write_quantized(
        tiny.build("mixtral", tmp_path / "plain"), tmp_path / "model", KINDS["gptq reordered"]
    )
    fields = dict(KINDS["gptq reordered"].fields) | {"desc_act": False}
    edit_config(tmp_path / "model", quantization_config=fields)
    with pytest.raises(ModelRefused, match="g_idx is not in order, which desc_act false says"):
        logits_of(tmp_path / "model", tmp_path / "cache", PROMPT, expert_format="int4")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda groups: groups.flip(0), "orders of their own .g_idx.; keep its experts with"),
        (torch.zeros_like, "g_idx has groups not of 32 inputs"),
    ],
)
def test_orders_that_no_tile_can_hold_are_refused(
    harm: Callable[[torch.Tensor], torch.Tensor], words: str, tmp_path: Path
) -> None:
    """Other formats decode these."""
    kind = KINDS["gptq reordered"]
    write_quantized(tiny.build("mixtral", tmp_path / "plain"), tmp_path / "model", kind)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if ".experts." in key and key.endswith(".g_idx"))
    weights[key] = harm(weights[key]).contiguous()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelRefused, match=words):
        logits_of(tmp_path / "model", tmp_path / "cache", PROMPT, expert_format="int4")
