"""Bytes of weights that one token is multiplied with, in the formats that are chosen and others."""

import torch
from transformers import PreTrainedModel

from moestro.engine.facts import EngineConfig
from moestro.engine.formats import Codec, codec_of, in_tiles, pack_layer
from moestro.engine.planning import Blueprint
from moestro.engine.weights import replacements, saved_bytes

from .gains import DEMO_PERPLEXITY, NATIVE, Gains, Reading, gains_over


def gains_of(config: EngineConfig, blueprint: Blueprint) -> Gains | None:
    """What smaller formats would gain; None where the library does not compute, or nothing would

    be gained.
    """
    dtype, kind = blueprint.device.compute_dtype, blueprint.device.place.type
    chosen = (config.format_name, config.dense_format)
    if NATIVE not in chosen or not in_tiles(dtype, kind):
        return None
    model = blueprint.build_model()
    dense = {
        name: _dense_bytes(blueprint, model, name)
        for name in dict.fromkeys([config.dense_format, *(name for _, name in DEMO_PERPLEXITY)])
    }
    now = Reading(*chosen, _experts_bytes(blueprint, blueprint.codec) + dense[config.dense_format])
    others = [
        Reading(experts, name, _experts_bytes(blueprint, codec_of(experts, dtype)) + dense[name])
        for experts, name in DEMO_PERPLEXITY
    ]
    return gains_over(now, others)


def _experts_bytes(blueprint: Blueprint, codec: Codec) -> int:
    """Of those that one token takes, over all layers; of the average one where they differ."""
    layers = (pack_layer(codec, entry) for entry in blueprint.experts)
    chosen = blueprint.topology.experts_per_token
    return sum(
        count * layer.total_bytes // layer.num_experts
        for count, layer in zip(chosen, layers, strict=True)
    )


def _dense_bytes(blueprint: Blueprint, model: PreTrainedModel, dense_format: str) -> int:
    """All of the dense part but the embeddings, of which a token looks up one row."""
    checkpoint, itemsize = blueprint.checkpoint, blueprint.itemsize
    routers = blueprint.topology.stock_paths
    found = replacements(model, routers, dense_format, checkpoint, tiled=True)
    kept = checkpoint.dense_bytes(blueprint.dense_keys, itemsize)
    replaced = {each.path: each.bytes for each in found}
    looked_up = sum(
        replaced.get(path, itemsize * module.weight.numel())
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module._parameters
    )
    return kept - saved_bytes(model, found, itemsize) - looked_up
