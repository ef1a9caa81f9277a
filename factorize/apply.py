"""Writes the model with experts that a plan makes of a dense model, as a stock checkpoint.

GraniteMoeShared (or its sibling with windows) carries it exactly: Llama's attention, an always-on
expert beside the routed ones, a router without bias. Its gates are a softmax over the chosen
logits; with router rows this small they are all 1/k, and k, folded into the experts' down
projections, cancels it.
Letters: H hidden size, S shared neurons, E experts, M neurons of one expert.
"""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moestro.engine import Manifest, Progress, ProgressFn
from moestro.factorize.facts import (
    PARTS,
    Deltas,
    FactorizeError,
    Plan,
    expert_groups,
    require_free,
    staged,
    with_none,
)
from moestro.factorize.families import SINK, layer_fields, sink_names, stored_name, twin_class
from moestro.factorize.sources import INDEX_NAME, CarriedReader, DenseModel

from .sidecar import stock_router, write_routers

SHARD_BYTES = 2 << 30
DENSE_CONFIG_NAME = "moestro_dense.json"  # the dense model's config.json, for the way back
DENSE_PARTS = ("gate_proj", "up_proj", "down_proj")
COPIED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
]

CARRIED = (  # from the dense model's configuration, under the same names
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)

Tensors = dict[str, torch.Tensor]


def apply_plan(
    plan: Plan, source: Path, out: Path, progress: ProgressFn, deltas: Deltas | None = None
) -> None:
    """Writes the folder `out`, whole or not at all; the same bytes each time.

    `deltas` are added to the dense weights first. Raises SourceRefused when the plan is not for
    `source` or the deltas are not for the plan, FactorizeError when the disk is full.
    """
    dense = DenseModel.open(source)
    progress(Progress("factorize", 0, dense.layers, "layers"))
    plan.check_fits(dense.layers, dense.neurons, dense.hidden, dense.content_sha256())
    if deltas is not None:
        deltas.check_fits(dense.layers, dense.neurons, dense.hidden, plan.sha256)
    out.parent.mkdir(parents=True, exist_ok=True)
    stored = stored_dtype(dense.carried_dtype, plan, deltas)
    wider = stored.itemsize / dense.dtype.itemsize
    require_free(out.parent, int(dense.source_bytes * wider * 1.1), "the model with experts")
    with staged(out) as folder:
        write_weights(folder, _all_tensors(dense, plan, deltas, stored, progress))
        twin_config(dense, plan).save_pretrained(folder)
        write_routers(plan, folder)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if not dense.family.told_by_twin(dense.config):
            shutil.copyfile(source / "config.json", folder / DENSE_CONFIG_NAME)
        manifest(plan, deltas).write(folder)


def output_factors(plan: Plan) -> list[float]:
    """What each layer's routed experts are multiplied with: k, for the gates, and the scale.

    The manifest names k alone: served with K experts and K / k, a layer's sum keeps its scale.
    """
    options = plan.facts.options
    counts = options.layers or (options.experts_per_token,) * len(plan.scales)
    factors = [count * scale for count, scale in zip(counts, plan.scales.tolist(), strict=True)]
    # k times a rounded E / k is meant to be E
    return [float(round(f)) if math.isclose(f, round(f), rel_tol=1e-6) else f for f in factors]


def stored_dtype(source: torch.dtype, plan: Plan, deltas: Deltas | None) -> torch.dtype:
    """What the twin's weights are stored in; those with deltas lie on no grid and are rounded."""
    if deltas is None:
        return storage_dtype(source, output_factors(plan))
    return torch.float32 if source == torch.float32 else torch.float16


def storage_dtype(source: torch.dtype, factors: Sequence[float]) -> torch.dtype:
    """The smallest type that holds `factors` times a weight of the type `source` well enough.

    Whole factors fit exactly. A bfloat16 has 8 significant bits and a float16 11, so 12 = 3 * 4
    fits there (save for parts below 2**-24, which float16 rounds away). Of other factors the
    products are rounded to at least three bits more than `source` has.
    """
    if all(factor.is_integer() for factor in factors):
        odd_bits = max(_odd_part(int(factor)).bit_length() for factor in factors)
        if odd_bits == 1:
            return source
        if source == torch.bfloat16 and 8 + odd_bits <= 11:
            return torch.float16
        return torch.float32
    return torch.float16 if source == torch.bfloat16 else torch.float32


def _odd_part(number: int) -> int:
    return number // (number & -number)


def manifest(plan: Plan, deltas: Deltas | None = None) -> Manifest:
    options, facts, neurons = plan.facts.options, plan.facts, plan.order.shape[1]
    return Manifest(
        experts_per_token=options.experts_per_token,
        num_experts=options.experts,
        output_factor=float(options.experts_per_token),
        source=facts.source,
        method=facts.method,
        plan_sha256=plan.sha256,
        deltas_sha256="" if deltas is None else deltas.sha256,
        sequence_density=options.sequence_density,
        neurons=neurons if options.has_empty_places(neurons) else 0,
    )


def twin_config(dense: DenseModel, plan: Plan) -> Any:
    llama, options = dense.config, plan.facts.options
    head_dim = getattr(llama, "head_dim", None) or llama.hidden_size // llama.num_attention_heads
    # not a field of the twin's own, but its attention and its angles both ask for it
    fields: dict[str, Any] = {"head_dim": head_dim}
    fields |= {name: getattr(llama, name) for name in CARRIED if hasattr(llama, name)}
    fields |= {
        "attention_bias": getattr(llama, "attention_bias", False),
        "attention_multiplier": head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
    }
    fields |= dense.family.twin_fields(llama)
    kinds = dense.family.layers(llama)
    config_class, model_class = twin_class(kinds)
    config = config_class(
        **fields,
        **layer_fields(kinds, llama.rope_parameters, llama.max_position_embeddings),
        intermediate_size=options.expert_neurons(dense.neurons),
        shared_intermediate_size=options.shared_neurons,
        num_local_experts=options.experts,
        num_experts_per_tok=options.experts_per_token,
    )
    # what is computed in; what is stored is smaller, and the router would vanish in float16
    config.dtype = torch.float32
    config.architectures = [model_class]
    return config


def _all_tensors(
    dense: DenseModel,
    plan: Plan,
    deltas: Deltas | None,
    stored: torch.dtype,
    progress: ProgressFn,
) -> Iterator[Tensors]:
    with dense.carried_tensors() as reader:
        outside = [name for name in reader.names() if not _layer_of(name)]
        if dense.config.tie_word_embeddings:
            outside = [name for name in outside if name != "lm_head.weight"]
        yield {name: _as_stored(reader, name, stored) for name in outside}
        kinds = dense.family.layers(dense.config)
        for name in sink_names(kinds):
            yield {name: torch.full((int(dense.config.num_attention_heads),), SINK)}
        for layer in range(dense.layers):
            ffn = _ffn_weights(reader, layer, deltas)
            tensors = _attention_tensors(reader, layer, stored) | _expert_tensors(
                ffn, plan, layer, stored
            )
            yield {stored_name(name, kinds): tensor for name, tensor in tensors.items()}
            progress(Progress("factorize", layer + 1, dense.layers, "layers"))


def _layer_of(name: str) -> str:
    return name.split(".")[2] if name.startswith("model.layers.") else ""


def _attention_tensors(reader: CarriedReader, layer: int, stored: torch.dtype) -> Tensors:
    names = [
        name
        for name in reader.names()
        if _layer_of(name) == str(layer) and not any(f".mlp.{p}." in name for p in DENSE_PARTS)
    ]
    return {name: _as_stored(reader, name, stored) for name in names}


def _ffn_weights(reader: CarriedReader, layer: int, deltas: Deltas | None) -> list[torch.Tensor]:
    """Gate and up [I, H], down [H, I] of one layer."""
    weights = [reader.get(f"model.layers.{layer}.mlp.{part}.weight") for part in DENSE_PARTS]
    if deltas is None:
        return weights
    return [deltas.add_to(weight, part, layer) for weight, part in zip(weights, PARTS, strict=True)]


def _expert_tensors(
    ffn: Sequence[torch.Tensor], plan: Plan, layer: int, stored: torch.dtype
) -> Tensors:
    prefix = f"model.layers.{layer}"
    gate, up, down = ffn
    options = plan.facts.options
    order = plan.order[layer].long()
    shared, groups = order[: options.shared_neurons], expert_groups(order, options)  # [E, M]
    experts_in = torch.cat([with_none(gate)[groups], with_none(up)[groups]], dim=1)  # [E, 2M, H]
    experts_out = with_none(down, dim=1)[:, groups].transpose(0, 1)  # [E, H, M]
    tensors = {
        "block_sparse_moe.input_linear": experts_in,
        "block_sparse_moe.output_linear": experts_out.float() * output_factors(plan)[layer],
    }
    if options.shared_neurons:
        tensors["shared_mlp.input_linear"] = torch.cat([gate[shared], up[shared]])  # [2S, H]
        tensors["shared_mlp.output_linear"] = down[:, shared]
    named = {f"{prefix}.{name}.weight": tensor for name, tensor in tensors.items()}
    named = {name: _to(tensor, stored, name) for name, tensor in named.items()}
    return named | stock_router(plan, layer)


def _as_stored(reader: CarriedReader, name: str, stored: torch.dtype) -> torch.Tensor:
    return _to(reader.get(name), torch.float32 if reader.rounds(name) else stored, name)


def _to(tensor: torch.Tensor, stored: torch.dtype, name: str) -> torch.Tensor:
    converted = tensor.to(stored).contiguous()
    if not bool(converted.isfinite().all()):
        raise FactorizeError(f"{name} has values that {stored} cannot hold")
    return converted


def write_weights(folder: Path, parts: Iterator[Tensors]) -> None:
    """One file, or several of SHARD_BYTES and an index; never more than one of them in memory."""
    shards: list[list[str]] = []
    held: Tensors = {}
    total_bytes = 0
    for part in parts:
        held |= part
        total_bytes += _size_bytes(part)
        if _size_bytes(held) >= SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), held))
            held = {}
    if held:
        shards.append(_write_shard(folder, len(shards), held))
    if len(shards) == 1:
        (folder / _aside(0)).rename(folder / "model.safetensors")
        return
    names: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / _aside(i)).rename(folder / file)
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(names.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), "utf-8")


def _write_shard(folder: Path, index: int, tensors: Tensors) -> list[str]:
    save_file(tensors, folder / _aside(index), {"format": "pt"})
    return list(tensors)


def _aside(index: int) -> str:
    return f"shard-{index}.safetensors"


def _size_bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
