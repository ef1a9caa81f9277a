"""Tiny random GGUF files of architectures with experts, written with the gguf library.

Values are drawn; in types that the library does not encode, the blocks' bytes are. Names are those
that llama.cpp gives, and nothing here knows how moestro reads them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

LAYERS, HEADS, KV_HEADS, EXPERTS, PER_TOKEN = 2, 4, 2, 4, 2
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*LETTERS, "he", "ll", "hell", "<|im_end|>", "<|endoftext|>"]
MERGES = ["h e", "l l", "he ll"]
END, START = len(TOKENS) - 2, len(TOKENS) - 1
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}assistant:"
Shapes = dict[str, tuple[int, ...]]


def shapes(architecture: str, hidden: int, inner: int) -> Shapes:
    """As in torch, of every tensor."""
    vocabulary = len(TOKENS)
    found: Shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    found["output.weight"] = (vocabulary, hidden)
    for layer in range(LAYERS):
        of_layer = LAYER[architecture](hidden, inner, layer)
        found |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    return found


def _experts(hidden: int, inner: int) -> Shapes:
    return {
        "ffn_gate_inp.weight": (EXPERTS, hidden),
        "ffn_gate_exps.weight": (EXPERTS, inner, hidden),
        "ffn_up_exps.weight": (EXPERTS, inner, hidden),
        "ffn_down_exps.weight": (EXPERTS, hidden, inner),
    }


def _shared(hidden: int, inner: int) -> Shapes:
    return {
        "ffn_gate_inp_shexp.weight": (hidden,),
        "ffn_gate_shexp.weight": (inner, hidden),
        "ffn_up_shexp.weight": (inner, hidden),
        "ffn_down_shexp.weight": (hidden, inner),
    }


def _attention(hidden: int, width: int) -> Shapes:
    return {
        "attn_q.weight": (HEADS * width, hidden),
        "attn_k.weight": (KV_HEADS * width, hidden),
        "attn_v.weight": (KV_HEADS * width, hidden),
        "attn_output.weight": (hidden, HEADS * width),
    }


def _qwen2moe(hidden: int, inner: int, _layer: int) -> Shapes:
    width = hidden // HEADS
    return {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q.bias": (HEADS * width,),
        "attn_k.bias": (KV_HEADS * width,),
        "attn_v.bias": (KV_HEADS * width,),
        **_attention(hidden, width),
        **_experts(hidden, inner),
        **_shared(hidden, 2 * inner),
    }


def _qwen3moe(hidden: int, inner: int, _layer: int) -> Shapes:
    width = hidden // HEADS
    return {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q_norm.weight": (width,),
        "attn_k_norm.weight": (width,),
        **_attention(hidden, width),
        **_experts(hidden, inner),
    }


def _minimax(hidden: int, inner: int, _layer: int) -> Shapes:
    width = hidden // HEADS
    return {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_q_norm.weight": (HEADS * width,),
        "attn_k_norm.weight": (KV_HEADS * width,),
        "exp_probs_b.bias": (EXPERTS,),
        **_attention(hidden, width),
        **_experts(hidden, inner),
    }


def _qwen35moe(hidden: int, inner: int, layer: int) -> Shapes:
    """The first layer is linear, the second attends (`full_attention_interval` 2)."""
    width, state = hidden // HEADS, 32
    keys, values = 2 * state, 4 * state
    linear: Shapes = {
        "attn_qkv.weight": (2 * keys + values, hidden),
        "attn_gate.weight": (values, hidden),
        "ssm_alpha.weight": (4, hidden),
        "ssm_beta.weight": (4, hidden),
        "ssm_conv1d.weight": (2 * keys + values, 4),
        "ssm_norm.weight": (state,),
        "ssm_out.weight": (hidden, values),
        "ssm_a": (4,),
        "ssm_dt.bias": (4,),
    }
    attending = {
        **_attention(hidden, width),
        "attn_q.weight": (2 * HEADS * width, hidden),
        "attn_q_norm.weight": (width,),
        "attn_k_norm.weight": (width,),
    }
    return {
        "attn_norm.weight": (hidden,),
        "post_attention_norm.weight": (hidden,),
        **(attending if layer % 2 else linear),
        **_experts(hidden, inner),
        **_shared(hidden, inner),
    }


def _llama(hidden: int, inner: int, _layer: int) -> Shapes:
    """As Mixtral's."""
    return {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        **_attention(hidden, hidden // HEADS),
        **_experts(hidden, inner),
    }


LAYER = {
    "llama": _llama,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "minimax-m2": _minimax,
    "qwen35moe": _qwen35moe,
}


def fields(architecture: str, hidden: int, inner: int) -> dict[str, Any]:
    width = hidden // HEADS
    found: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": hidden,
        "block_count": LAYERS,
        "feed_forward_length": 2 * inner,
        "expert_feed_forward_length": inner,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10_000.0,
        "expert_count": EXPERTS,
        "expert_used_count": PER_TOKEN,
    }
    if architecture == "qwen2moe":
        found["expert_shared_feed_forward_length"] = 2 * inner
    if architecture == "minimax-m2":
        found |= {"rope.dimension_count": width // 2, "expert_gating_func": 2}
        found["feed_forward_length"] = inner  # its experts' width is the older reader's only one
    if architecture == "qwen35moe":
        found |= {
            "expert_shared_feed_forward_length": inner,
            "ssm.conv_kernel": 4,
            "ssm.state_size": 32,
            "ssm.group_count": 2,
            "ssm.time_step_rank": 4,
            "ssm.inner_size": 128,
            "full_attention_interval": 2,
            "rope.dimension_count": width // 2,
            "rope.dimension_sections": [width // 4 - 2 * (width // 12)] + 2 * [width // 12] + [0],
        }
    return found


def values(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    draw = np.random.default_rng([seed, *name.encode()])
    found = draw.normal(0, 0.05, shape)
    if "norm" in name:
        found += 1
    return (-np.abs(found) - 0.5 if name.endswith("ssm_a") else found).astype(np.float32)


def blocks(kind: Kind, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.uint8]:
    """Drawn bytes of whole blocks; scales for values of a size like the other types'."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 256, (int(np.prod(shape)) // size, length), dtype=np.uint8)
    largest, *places = SCALES[kind]
    for place in places:
        scales = draw.uniform(largest / 3, largest, len(rows)).astype(np.float16)
        rows[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return rows.reshape(*shape[:-1], shape[-1] // size * length)


# How large the scales of a block are at most, and where it has them, in fp16 (ggml-common.h).
SCALES: dict[Kind, tuple[float, *tuple[int, ...]]] = {
    Kind.Q4_K: (3e-4, 0, 2),
    Kind.Q5_K: (1.5e-4, 0, 2),
    Kind.Q6_K: (6e-5, 208),
    Kind.IQ4_XS: (6e-5, 0),
}


def write_gguf(
    path: Path,
    architecture: str = "qwen3moe",
    kind: Kind = Kind.F32,
    *,
    hidden: int = 64,
    inner: int = 32,
    parts: int = 1,
    others: Mapping[str, Any] | None = None,
    tied: bool = False,
    begins: bool = False,
) -> Path:
    """The first file. `kind` is of every matrix; with `parts`, names end in their places.

    `others` are fields, behind the architecture; None takes one away. With `begins` each text
    has a token before it.
    """
    largest: dict[str, Any] = {
        "split_max_tensors": -(-len(shapes(architecture, hidden, inner)) // parts)
    }
    writer = gguf.GGUFWriter(path, architecture, **(largest if parts > 1 else {}))
    for key, value in (fields(architecture, hidden, inner) | dict(others or {})).items():
        if value is not None:
            _add_field(writer, f"{architecture}.{key}", value)
    _add_tokenizer(writer, begins)
    if parts == 1:  # the library says it in the first part alone
        writer.add_custom_alignment(64)
    writer.add_tags(["tiny", "random"])
    for name, shape in shapes(architecture, hidden, inner).items():
        if not (tied and name == "output.weight"):
            _add_tensor(writer, name, shape, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, begins: bool) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(START)
    writer.add_bos_token_id(START)
    writer.add_add_bos_token(begins)
    writer.add_chat_template(TEMPLATE)


def _add_tensor(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: Kind) -> None:
    matrix = len(shape) > 1 and "conv1d" not in name and "ffn_gate_inp" not in name
    if kind in gguf.GGML_QUANT_SIZES and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Kind.Q8_0  # rows that are no whole blocks, as llama.cpp does
    if not matrix or kind is Kind.F32:
        writer.add_tensor(name, values(name, shape, 1))
    elif kind in SCALES:
        data = blocks(kind, shape, len(name))
        writer.add_tensor(name, data, raw_dtype=kind)
    else:
        encoded = gguf.quantize(values(name, shape, 1), kind)
        writer.add_tensor(name, encoded, raw_dtype=kind)
