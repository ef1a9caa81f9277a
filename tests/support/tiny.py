"""Tiny random models in their real checkpoint layout, with a byte-level tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = "<eos>"
WIDTHS: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 258,
    "bos_token_id": 257,
    "eos_token_id": 256,
}


def _mixtral() -> hf.PreTrainedConfig:
    return hf.MixtralConfig(**WIDTHS, num_local_experts=8, num_experts_per_tok=2)


def _olmoe() -> hf.PreTrainedConfig:
    return hf.OlmoeConfig(**WIDTHS, num_experts=8, num_experts_per_tok=2)


def _qwen3_moe() -> hf.PreTrainedConfig:
    wider: dict[str, Any] = {**WIDTHS, "head_dim": 16}
    return hf.Qwen3MoeConfig(
        **wider, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    )


def _granite_shared() -> hf.PreTrainedConfig:
    return hf.GraniteMoeSharedConfig(
        **WIDTHS, num_local_experts=8, shared_intermediate_size=32, tie_word_embeddings=True
    )


def _gpt_oss() -> hf.PreTrainedConfig:
    return hf.GptOssConfig(
        **WIDTHS,
        num_local_experts=8,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _deepseek_v3() -> hf.PreTrainedConfig:
    widths = {**WIDTHS, "num_key_value_heads": 4}
    return hf.DeepseekV3Config(
        **widths,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )


FAMILIES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "granitemoeshared": _granite_shared,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}


def build(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of `family` with its tokenizer into `folder`; returns it."""
    return save(FAMILIES[family](), folder, dtype)


def save(config: hf.PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype=dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """256 bytes, then <eos>, <bos>, <pad>, <unk>: every text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, "<bos>", "<pad>", "<unk>"])
    wrapped = hf.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, bos_token="<bos>", pad_token="<pad>"
    )
    wrapped.save_pretrained(folder)


def oracle(folder: Path) -> Any:
    """The same checkpoint in stock transformers, fp32, eager."""
    return hf.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).train(False)
