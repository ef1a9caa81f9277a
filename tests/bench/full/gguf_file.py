"""A synthetic checkpoint as GGUF, Q8_0, written tensor by tensor: one layer's third in memory.

The recipe is that of llama.cpp's own quantizer for Q8_0 (norms and routers in fp32, all else
Q8_0); Q4_0 is then made by that quantizer itself, from this file.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from .geometry import EXPERT_PARTS, Geometry
from .words import vocabulary

Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32
ROW_NUMBERS, ROW_BYTES = 32, 34  # of a Q8_0 block: one half-precision scale and 32 digits

DENSE_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps.weight",
    "up_proj": "ffn_up_exps.weight",
    "down_proj": "ffn_down_exps.weight",
}


def write_q8_0(checkpoint: Path, out: Path, shape: Geometry) -> Path:
    """Reads `checkpoint` (HF, bf16) and writes `out`. Does nothing where it lies already."""
    if out.exists():
        return out
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "olmoe")
    _facts(writer, shape)
    with safe_open(checkpoint / "dense.safetensors", "pt") as dense:
        jobs = [*_dense_jobs(dense, shape)]
        for layer in range(shape.layers):
            jobs += _expert_jobs(checkpoint, shape, layer)
        for name, shaped, kind, _ in jobs:
            _declare(writer, name, shaped, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, kind, read in jobs:
            tensor = read()
            writer.write_tensor_data(
                tensor.float().numpy() if kind is F32 else quantize_q8_0(tensor)
            )
    writer.close()
    part.replace(out)
    return out


Job = tuple[str, tuple[int, ...], Any, Callable[[], torch.Tensor]]


def _dense_jobs(dense: Any, shape: Geometry) -> list[Job]:
    jobs: list[Job] = []
    for name, shaped in shape.dense_shapes().items():
        kind = F32 if len(shaped) == 1 or name.endswith("mlp.gate.weight") else Q8_0
        jobs.append((gguf_name(name), shaped, kind, partial(dense.get_tensor, name)))
    return jobs


def gguf_name(name: str) -> str:
    """The name in GGUF of a dense tensor of the checkpoint."""
    if name in DENSE_NAMES:
        return DENSE_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}"


def _expert_jobs(checkpoint: Path, shape: Geometry, layer: int) -> list[Job]:
    path, shapes = checkpoint / f"experts-{layer:02}.safetensors", shape.expert_shapes(layer)

    def read(part: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            names = [name for name in shapes if name.endswith(f"{part}.weight")]
            return torch.stack([file.get_tensor(name) for name in names])

    jobs: list[Job] = []
    for part in EXPERT_PARTS:
        shaped = next(s for name, s in shapes.items() if name.endswith(f"{part}.weight"))
        name = f"blk.{layer}.{EXPERT_NAMES[part]}"
        jobs.append((name, (shape.experts, *shaped), Q8_0, partial(read, part)))
    return jobs


def _declare(writer: Any, name: str, shaped: tuple[int, ...], kind: Any) -> None:
    if kind is F32:
        count = int(np.prod(shaped))
        writer.add_tensor_info(name, list(shaped), np.dtype(np.float32), 4 * count)
        return
    stored = [*shaped[:-1], shaped[-1] // ROW_NUMBERS * ROW_BYTES]
    count = int(np.prod(stored))
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), count, raw_dtype=kind)


def quantize_q8_0(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """[..., K] -> uint8 [..., K / 32 * 34]: per 32 numbers their scale and 32 signed digits."""
    out = np.empty((*tensor.shape[:-1], tensor.shape[-1] // ROW_NUMBERS, ROW_BYTES), dtype=np.uint8)
    flat = out.reshape(-1, ROW_BYTES)
    blocks = tensor.reshape(-1, ROW_NUMBERS)
    for at in range(0, len(blocks), 1 << 20):  # 128 MiB of fp32 at a time
        some = blocks[at : at + (1 << 20)].float()
        scale = some.abs().amax(1, keepdim=True) / 127
        digits = (some / scale.clamp(min=1e-30)).round_().to(torch.int8)
        flat[at : at + (1 << 20), :2] = scale.to(torch.float16).view(torch.uint8).numpy()
        flat[at : at + (1 << 20), 2:] = digits.view(torch.uint8).numpy()
    return out.reshape(*tensor.shape[:-1], -1)


def _facts(writer: Any, shape: Geometry) -> None:
    """What llama.cpp's own converter writes for OLMoE."""
    writer.add_name("synthetic")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.experts_per_token)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens, merges = vocabulary(shape.vocab)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [special[0] if index < 2 else special[1] for index in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
