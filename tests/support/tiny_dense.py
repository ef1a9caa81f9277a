"""A tiny random dense model of each family that `moestro factorize` carries, on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_llama import byte_tokenizer

FIELDS: Mapping[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# by the name of the case: the model type, and what it needs or what is tried there
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "ministral": (
        "ministral",
        {
            "sliding_window": 9,
            "head_dim": 16,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "logits_scaling": 3.0,
        },
    ),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma-gelu": ("gemma", {"head_dim": 8, "hidden_act": "gelu"}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 9}),
    "olmo": ("olmo", {}),
}


def write_tiny_dense(folder: Path, case: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """`case` is a name of CASES."""
    kind, changes = CASES[case]
    config = AutoConfig.for_model(kind, **(dict(FIELDS) | dict(changes)))
    torch.manual_seed(7)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# What is odd in these the others have, too.
REPEATED = {
    "llama",
    "mistral",
    "ministral",
    "qwen2-window",
    "seed_oss",
    "gemma-gelu",
    "phi3-window",
}
