"""A tiny random checkpoint of any model type with experts, in the layout of its releases."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from family_fields import PARTS, WITHIN
from family_names import KNOWN
from family_sizes import LANGUAGE, LAYERS, TOWER, WHOLE
from tiny import write_tokenizer

# Their releases name tensors without the prefix that saving writes, and conversion wants them so.
RELEASED_WITHOUT_PREFIX = {"deepseek_v4"}
MAX_WEIGHTS = 20_000_000
SEED = 2  # one with which stock's own steps and whole prompts differ by 2e-5 at the most
LANGUAGE_PARTS = ("text_config", "attn_config", "ffn_config")
KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")


def tiny_config(kind: str) -> Any:
    """A configuration of model type `kind` that is small in every field known to be a size."""
    return _small(hf.CONFIG_MAPPING[kind](), kind, "")


def model_class(kind: str) -> Any:
    return getattr(hf, KNOWN[kind])


def count_weights(kind: str, config: Any) -> int:
    with torch.device("meta"):
        model = model_class(kind)._from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def build(kind: str, folder: Path) -> Path:
    """Write a random fp32 model of type `kind` with its tokenizer into `folder`; returns it."""
    config = tiny_config(kind)
    weights = count_weights(kind, config)
    if weights > MAX_WEIGHTS:
        raise ValueError(f"{kind}: {weights} weights are not tiny; see tests/support/family_sizes")
    torch.manual_seed(SEED)
    model = model_class(kind)._from_config(config, dtype=torch.float32)
    _randomize(model)
    model.save_pretrained(folder)
    if kind in RELEASED_WITHOUT_PREFIX:
        _drop_prefix(folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def _randomize(model: Any) -> None:
    """Matrices and biases, buffers among them, normal 0.1; what else is a vector moves by that.

    No two norms are alike then, and sinks differ from head to head.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            else:
                std = 1.0 if name.endswith("sinks") else 0.1
                parameter += torch.empty_like(parameter).normal_(std=std)
        for name, buffer in model.named_buffers():
            if "bias" in name.rpartition(".")[2] and buffer.is_floating_point():
                buffer.normal_(std=0.1)


def _drop_prefix(path: Path) -> None:
    tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def oracle(kind: str, folder: Path) -> Any:
    """The same checkpoint in stock transformers, fp32, eager."""
    return (
        model_class(kind)
        .from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        .train(False)
    )


def _small(default: Any, kind: str, path: str) -> Any:
    """The configuration like `default`, one part of type `kind`'s, with small sizes."""
    parts = {k: v for k, v in vars(default).items() if isinstance(v, hf.PreTrainedConfig)}
    table = _table(path, whole="text_config" in parts)
    given: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in parts:
            given[name] = _small(value, kind, f"{path}.{name}".lstrip("."))
        elif name in KINDS_OF_LAYERS and isinstance(value, list) and table is LANGUAGE:
            given[name] = _few_of_each(value)
        elif name in table:
            given[name] = table[name]
    if "kv_lora_rank" in given:  # latent attention: every head has keys of its own
        given["num_key_value_heads"] = given["num_attention_heads"]
    fields = vars(default)
    if "qk_rope_head_dim" in given and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        given["head_dim"] = given["qk_rope_head_dim"]
    given |= PARTS.get(default.model_type, {}) | WITHIN.get(f"{kind}:{path}", {})
    return type(default)(**given)


def _table(path: str, *, whole: bool) -> dict[str, Any]:
    if path in LANGUAGE_PARTS or not (path or whole):
        return LANGUAGE
    return TOWER if path else WHOLE


def _few_of_each(kinds: list[str]) -> list[str]:
    """LAYERS entries that have every kind in `kinds`: a dense one once, the others in turn."""
    order = list(dict.fromkeys(kinds))
    if order[0] == "dense":
        return [order[0], *order[1:] * (LAYERS - 1)][:LAYERS]
    return (order * LAYERS)[:LAYERS]
