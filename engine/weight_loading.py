"""A planned model's weights: experts into the pack and its cache, the dense part into memory."""

import logging
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from moestro.cache import (
    ExpertCache,
    Pack,
    PackWriter,
    emulated,
    open_or_build,
    plan_tiers,
    two_tiers,
)
from moestro.engine.facts import Device, EngineConfig, StartError
from moestro.engine.formats import ExpertsModule, encode_layer, keeps_grids
from moestro.engine.kernels import Scratch
from moestro.engine.planning import (
    Blueprint,
    MemoryPlan,
    compact_modules,
    kept_dense,
    release_freed_memory,
    trim_heap,
)
from moestro.engine.weights import LastRows, Shared, load_dense, settle

from .phases import Phases

log = logging.getLogger("moestro.engine")


def load_weights(
    config: EngineConfig, blueprint: Blueprint, plan: MemoryPlan, phases: Phases
) -> tuple[PreTrainedModel, ExpertCache]:
    checkpoint, spec = blueprint.checkpoint, blueprint.spec
    path = config.pack_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"--cache-dir {config.cache_dir}: {error.strerror}") from error
    phases.enter("pack")

    layers = len(blueprint.experts)

    def fill(writer: PackWriter) -> None:
        scratch = blueprint.build_model()  # experts keep the file's dtype
        missing = writer.missing
        for place, index in enumerate(missing):
            phases.report(layers - len(missing) + place, layers, "layers")
            # no name holds one layer while the next one is loaded
            writer.add_layer(index, *_encoded(blueprint, scratch, blueprint.experts[index]))
        phases.report(layers, layers, "layers")

    pack = open_or_build(
        path,
        spec,
        fill,
        lambda: phases.report(0, 0, "waiting"),
        log,
        on_proof=lambda done, total: phases.report(done, total, "layers compared"),
    )
    phases.enter("load")
    model = _dense_model(config, blueprint, phases.report)
    checkpoint.close()
    release_freed_memory()
    least = max(blueprint.topology.experts_per_token)
    return model, _open_cache(config, blueprint.device, plan, pack, least)


def _encoded(
    blueprint: Blueprint, scratch: PreTrainedModel, entry: ExpertsModule
) -> list[dict[str, torch.Tensor]]:
    """A layer's experts as the pack has them."""
    checkpoint, codec = blueprint.checkpoint, blueprint.codec
    if keeps_grids(codec, entry):
        return encode_layer(codec, entry, *checkpoint.load_codes(scratch, entry))
    return encode_layer(codec, entry, checkpoint.load_experts(scratch, entry))


def _open_cache(
    config: EngineConfig, device: Device, plan: MemoryPlan, pack: Pack, least: int
) -> ExpertCache:
    if plan.host is not None and device.wire is not None:
        host_bytes, staging_bytes = plan.host.experts_bytes, device.staging_bytes
        tiers = plan_tiers(plan.experts_bytes, host_bytes, pack.spec, least, staging_bytes)
        log.info("expert cache: %s, next use over all layers, from %s", tiers, pack.path)
        return two_tiers(pack, tiers, device.wire(pack, tiers))
    tiers = plan_tiers(config.device_memory_bytes, plan.experts_bytes, pack.spec, least)
    log.info("expert cache: %s, next use over all layers, from %s", tiers, pack.path)
    if config.link is None:
        return ExpertCache(pack, tiers.host, sweeping=config.prefetch)
    log.warning("no device: this start imagines one behind an %s link", config.link)
    return two_tiers(pack, tiers, emulated(config.link, pack, tiers))


Report = Callable[[int, int, str], None]  # done, total, unit


def _dense_model(config: EngineConfig, blueprint: Blueprint, report: Report) -> PreTrainedModel:
    """The model with its dense weights: as an earlier start kept them, or made anew.

    Raises ModelRefused where the checkpoint does not fit the model.
    """
    checkpoint = blueprint.checkpoint
    device = blueprint.device
    model = blueprint.build_model()
    compact = compact_modules(config, blueprint, model)
    last = LastRows() if blueprint.topology.inputs_unchanged else None
    shared = Shared(last, Scratch())
    kept = kept_dense(config, blueprint)
    if kept is not None and kept.path.exists():
        if kept.restore(model, compact, shared):
            return model
        model = blueprint.build_model()

    def after_group(done: int, total: int) -> None:
        trim_heap()  # what a group was converted from lies in the heaps of the threads that read it
        report(done, total, "groups")

    load_dense(checkpoint, model, blueprint.dense_keys, compact, shared, after_group, device.place)
    if kept is not None:
        kept.keep(model, lambda done, total: report(done, total, "bytes"))
    settle(model, trim_heap)
    return model
