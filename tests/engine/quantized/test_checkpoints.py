"""Quantized checkpoints: decoded to what their formats say, served like the plain ones, refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import tiny
from engine_kit import logits_of
from moestro.engine.facts import ModelRefused
from moestro.engine.kernels import TileFormat, encode
from moestro.engine.quantized.arithmetic import block_scaled, fp4_blocks
from moestro.engine.quantized.slices import Decoded
from moestro.engine.weights import Checkpoint
from quantized_files import KINDS, edit_config, mxfp4_files, write_quantized
from tile_reference import decode

PROMPT = list(range(20, 50))
SLOW = {"gptq v2, 8 bits", "packed int8", "nf4", "fp8 of one scale", "int8 rows", "packed int4"}
EACH = [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {name: tiny.build(name, folder / name) for name in ("mixtral", "deepseek_v3")}


def logits(model: Path, cache: Path, **settings: Any) -> torch.Tensor:
    return logits_of(model, cache, PROMPT, **settings)


@pytest.mark.parametrize("kind", EACH)
def test_it_is_decoded_as_its_format_says(
    kind: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    twin = write_quantized(plain["mixtral"], tmp_path / "model", KINDS[kind])
    checkpoint, wanted = Checkpoint(tmp_path / "model"), load_file(twin / "model.safetensors")
    assert checkpoint._slices.keys() == wanted.keys()
    decoded = [key for key, part in checkpoint._slices.items() if isinstance(part, Decoded)]
    assert len(decoded) > 4 * (4 + 8 * 3) - 1  # attention and experts of four layers
    for key in wanted:
        found = checkpoint._slices[key][...]
        assert found.dtype == wanted[key].dtype and found.shape == wanted[key].shape
        limit = 1e-6 * float(wanted[key].abs().max())
        assert (found - wanted[key]).abs().max() <= limit, key
        assert torch.equal(checkpoint._slices[key][1:3], found[1:3])


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("fp8", "deepseek_v3"),
        ("gptq reordered", "mixtral"),
        pytest.param("awq", "deepseek_v3", marks=pytest.mark.slow),
        pytest.param("packed int4 with zeros", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("nf4 nested", "olmoe", marks=pytest.mark.slow),
        pytest.param("fp8 rows", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("awq", "olmoe", marks=pytest.mark.slow),
        pytest.param("fp8", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("fp8", "mixtral", marks=pytest.mark.slow),
        pytest.param("gptq", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("gptq", "deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_it_is_served_as_its_plain_twin(kind: str, family: str, tmp_path: Path) -> None:
    """Against stock transformers on the decoded weights, and moestro on them bit by bit."""
    folder = tiny.build(family, tmp_path / "plain")
    twin = write_quantized(folder, tmp_path / "model", KINDS[kind])
    found = logits(tmp_path / "model", tmp_path / "cache")
    with torch.inference_mode():
        wanted = tiny.oracle(twin)(torch.tensor([[*PROMPT, 7, 8]])).logits[0, len(PROMPT) - 1 :]
    assert (found - wanted).abs().max() < 1e-4
    small = {"expert_format": "int8", "dense_format": "int8"}
    pair = [logits(each, tmp_path / "cache", **small) for each in (tmp_path / "model", twin)]
    assert (pair[0] - pair[1]).abs().max() < 1e-4 * pair[1].abs().max()


@pytest.mark.parametrize("exponents", [False, True])
def test_blocks_of_fp8_are_transformers(exponents: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 48, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=draw)
    if exponents:
        scales = torch.randint(110, 130, (2, 3), generator=draw).to(torch.uint8)
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    assert torch.equal(block_scaled(weight, scales, (32, 16)), wanted)


def test_mxfp4_is_transformers_and_served(tmp_path: Path) -> None:
    folder, twin = (tiny.build("gpt_oss", tmp_path / name) for name in ("model", "plain"))
    plain = mxfp4_files(folder)
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    slices = Checkpoint(folder)._slices
    assert slices.keys() == plain.keys()
    for key in plain:
        assert torch.equal(slices[key][...], plain[key])
    found = logits(folder, tmp_path / "cache")
    with torch.inference_mode():
        wanted = tiny.oracle(twin)(torch.tensor([[*PROMPT, 7, 8]])).logits[0, len(PROMPT) - 1 :]
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_mxfp4_is_taken_over_as_it_is(tmp_path: Path) -> None:
    """The pack's tiles have the numbers of the files, each exactly."""
    folder = tiny.build("gpt_oss", tmp_path / "model")
    plain = mxfp4_files(folder)
    form = TileFormat("mxfp4", 32)
    for matrix in (plain[key] for key in plain if key.endswith(("gate_up_proj", "down_proj"))):
        for expert in matrix:
            stored = encode(expert.T.contiguous(), form)
            assert torch.equal(decode(stored, form, *expert.T.shape), expert.T)
    found, whole = (
        logits(folder, tmp_path / "cache", expert_format=name) for name in ("mxfp4", "native")
    )
    assert 0 < (found - whole).abs().max() < 0.05 * whole.abs().max()


def test_every_code_of_fp4() -> None:
    blocks = torch.arange(256).to(torch.uint8).view(1, 16, 16)
    found = fp4_blocks(blocks, torch.full((1, 16), 128, dtype=torch.uint8))
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    both = np.concatenate([values, -values]) * 2
    wanted = np.stack([np.tile(both, 16), np.repeat(both, 16)], 1).reshape(-1)
    assert found.flatten().tolist() == wanted.tolist()


def test_the_text_part_may_say_it(plain: dict[str, Path], tmp_path: Path) -> None:
    write_quantized(plain["mixtral"], tmp_path / "model", KINDS["awq"])
    said = KINDS["awq"].fields
    edit_config(
        tmp_path / "model", quantization_config=None, text_config={"quantization_config": said}
    )
    assert Checkpoint(tmp_path / "model").quantization is not None


def drop(suffix: str) -> Any:
    def harm(weights: dict[str, torch.Tensor]) -> None:
        del weights[next(key for key in weights if key.endswith(suffix))]

    return harm


def shorten(suffix: str) -> Any:
    def harm(weights: dict[str, torch.Tensor]) -> None:
        key = next(key for key in weights if key.endswith(suffix))
        weights[key] = weights[key][:-1].contiguous()

    return harm


@pytest.mark.parametrize(
    ("kind", "fields", "harm", "words"),
    [
        ("fp8", {"weight_block_size": [128]}, None, r"weight_block_size is \[128\], and must be"),
        ("fp8", {"weight_block_size": [16, 16]}, None, "and blocks of 16 x 16 need"),
        ("fp8", {}, drop("_scale_inv"), "is FP8 and has no .*_scale_inv beside it"),
        ("fp8", {}, shorten("_scale_inv"), "has scales .* the files disagree"),
        ("gptq", {"bits": 3}, None, "bits is 3, and must be one of 2, 4, 8"),
        ("gptq", {"bits": "4"}, None, "bits is '4', and must be one of"),
        ("gptq", {"bits": 8}, None, "config and the files disagree"),
        ("gptq", {"group_size": 16}, None, "where group_size 16 needs"),
        ("gptq", {"group_size": 0}, None, "group_size is 0, and must be"),
        ("gptq", {"checkpoint_format": "marlin"}, None, "checkpoint_format is 'marlin'"),
        ("gptq", {}, drop(".qzeros"), "has no .*qzeros beside it"),
        ("gptq", {}, shorten(".g_idx"), "scales, zeros or groups"),
        ("awq", {"version": "gemv"}, None, "version is 'gemv', and must be gemm"),
        ("awq", {"bits": 8}, None, "bits is 8, and must be one of 4"),
        ("awq", {}, drop(".scales"), "has no .*scales beside it"),
        ("packed int4", {"format": "marlin-24"}, None, "format is 'marlin-24', and must be one of"),
        ("packed int4", {"config_groups": {}}, None, "config_groups is {}, and must be groups"),
        ("packed int4", {"config_groups": 4}, None, "config_groups is 4, and must be an object"),
        ("packed int4", {}, drop(".weight_packed"), "has no .*weight beside it"),
        ("int8 rows", {}, shorten(".weight_scale"), "is I8 .* with scales"),
        ("int8 of bitsandbytes", {}, shorten(".SCB"), "is not as long as the rows"),
        ("nf4", {}, drop(".absmax"), "has no .*absmax beside it"),
        ("nf4", {}, shorten(".absmax"), "is not as large as its shape"),
        ("nf4", {}, shorten("bitsandbytes__nf4"), "is no state of a quantized tensor"),
        ("awq", {"quant_method": 4}, None, "quant_method is 4, and must be text"),
        ("awq", {"quant_method": "exl2"}, None, "quant_method is 'exl2', which is not carried"),
        ("awq", {"quant_method": "gptq"}, None, "has no .*g_idx|disagree"),
    ],
)
def test_what_contradicts_itself_is_refused_in_a_line(
    kind: str, fields: dict[str, Any], harm: Any, words: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_quantized(plain["mixtral"], folder, KINDS[kind])
    edit_config(folder, quantization_config=dict(KINDS[kind].fields) | fields)
    if harm is not None:
        weights = load_file(folder / "model.safetensors")
        harm(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelRefused, match=words) as refused:
        Checkpoint(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_a_config_that_is_no_object(plain: dict[str, Path], tmp_path: Path) -> None:
    write_quantized(plain["mixtral"], tmp_path / "model", KINDS["awq"])
    edit_config(tmp_path / "model", quantization_config="awq")
    with pytest.raises(ModelRefused, match="quantization_config is not a JSON object"):
        Checkpoint(tmp_path / "model")
