"""Packing a quantized checkpoint holds one layer at a time, seen from outside the process."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import tiny
from exposition import samples
from server_process import serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAYERS, EXPERTS, HIDDEN, WIDTH, BLOCK = 8, 32, 512, 512, 128
LAYER_BYTES = EXPERTS * 3 * HIDDEN * WIDTH * 2  # in bfloat16
PARTS = {  # what the files have of a fused parameter of the class
    "gate_up_proj": {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN)},
    "down_proj": {"down_proj": (HIDDEN, WIDTH)},
}


def write_fp8(folder: Path) -> None:
    """Random weights in shards of a layer each; qwen3_moe, whose releases come in such files."""
    config = hf.Qwen3MoeConfig(
        **tiny.WIDTHS
        | {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "moe_intermediate_size": WIDTH,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "head_dim": 64,
        }
    )
    with torch.device("meta"):
        shapes = hf.AutoModelForCausalLM.from_config(config).state_dict()
    config.dtype = torch.bfloat16
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    draw, places = torch.Generator().manual_seed(0), dict[str, str]()
    for number in range(-1, LAYERS):
        shard = dict[str, torch.Tensor]()
        for key, meta in shapes.items():
            layer = int(key.split(".")[2]) if key.startswith("model.layers.") else -1
            if layer != number:
                continue
            if key.endswith("_proj") and ".experts." in key:
                for name, shape in PARTS[key.rsplit(".", 1)[1]].items():
                    for expert in range(EXPERTS):
                        add(shard, f"{key.rsplit('.', 1)[0]}.{expert}.{name}", shape, draw)
            else:
                weight = torch.randn(meta.shape, generator=draw) * 0.05
                shard[key] = (weight + 1 if "norm" in key else weight).bfloat16()
        name = f"model-{number + 2:05}-of-{LAYERS + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config_path = folder / "config.json"
    said = json.loads(config_path.read_text())
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    config_path.write_text(json.dumps(said))


def add(
    shard: dict[str, torch.Tensor], name: str, shape: tuple[int, int], draw: torch.Generator
) -> None:
    shard[f"{name}.weight"] = torch.randn(shape, generator=draw).to(torch.float8_e4m3fn)
    blocks = tuple(-(-size // BLOCK) for size in shape)
    shard[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=draw) * 0.05


@pytest.mark.parametrize("expert_format", ["native", "fp8"])
def test_packing_fp8_takes_one_layer_beside_the_plan(expert_format: str, tmp_path: Path) -> None:
    """Decoded, and kept as it is."""
    write_fp8(tmp_path / "model")
    flags = (
        "--expert-format",
        expert_format,
        "--host-memory",
        "16MiB",
        "--kv-memory",
        "16MiB",
        "--threads",
        "1",
    )
    with serving(tmp_path / "model", *flags, "--cache-dir", str(tmp_path / "cache")) as server:
        assert server.complete("Once upon a time", max_tokens=4).status_code == 200
        found = samples(server.metrics())
        planned = sum(
            value for (name, _), value in found.items() if name == "moestro_memory_planned_bytes"
        )
        peak, log = server.peak_rss_bytes, server.log
    assert "weights: fp8, decoded to bfloat16" in log
    assert ("fp8 grid (groups of 128, float32 scales), kept as it is" in log) == (
        expert_format == "fp8"
    )
    # the plan holds the largest layer as it is loaded, and far less than all of them
    assert peak <= 1.05 * planned
    assert planned * 0.05 < LAYER_BYTES < LAYERS * LAYER_BYTES / 4
