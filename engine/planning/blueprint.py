"""A model understood and its memory planned, before anything is loaded."""

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moestro.cache import (
    LEAST_HOST_SLOTS,
    DoesNotFit,
    PackSpec,
    SlotPlan,
    human_bytes,
    plan_slots,
)
from moestro.engine.facts import (
    CPU,
    BudgetTooSmall,
    Device,
    EngineConfig,
    ModelRefused,
    Room,
    StartError,
    round_up_tokens,
)
from moestro.engine.formats import (
    Codec,
    ExpertsModule,
    expert_codec,
    in_tiles,
    order_of,
    pack_layer,
)
from moestro.engine.model import Topology, build_meta_model, trace
from moestro.engine.weights import Checkpoint, Manifest, Replacement, replacements, saved_bytes

from .device_memory import DEVICE_ALLOWANCE_BYTES, HostDemand, settle_host
from .limits import HostMemory, is_in_memory, memory_available, memory_limit, resident_bytes
from .memory import (
    ALLOWANCE_BYTES,
    DEFAULT_KV_BYTES,
    DEVICE_BUDGET,
    Demand,
    MemoryPlan,
    settle,
)
from .step_size import plan_best_steps, plan_given_steps

log = logging.getLogger("moestro.engine")

PACKING_COPIES = 2.5  # of one layer, while transformers converts it: 2.3 seen
# Of a token and one that it may see: two masks of booleans, and one of them as a product wants it.
MASK_BYTES = 6
BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model understood but not loaded."""

    checkpoint: Checkpoint
    topology: Topology
    experts: tuple[ExpertsModule, ...]  # in the order of a pass
    dense_keys: list[str]
    manifest: Manifest | None
    experts_per_token: int
    output_scale: float
    codec: Codec
    device: Device

    @property
    def vocab_size(self) -> int:
        return int(self.checkpoint.config.get_text_config().vocab_size)

    @property
    def num_layers(self) -> int:
        return int(self.checkpoint.config.get_text_config().num_hidden_layers)

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is computed with."""
        return self.device.compute_dtype.itemsize

    @property
    def spec(self) -> PackSpec:
        """The pack that this model needs."""
        layers = tuple(pack_layer(self.codec, entry) for entry in self.experts)
        order = order_of(self.codec)
        return PackSpec(self.checkpoint.fingerprint(), self.codec.name, layers, order)


def inspect(config: EngineConfig, device: Device = CPU) -> Blueprint:
    """Understand the model without loading it. Raises ModelNotFound or ModelRefused."""
    return understand(config, Checkpoint(config.model_path), device)


def understand(config: EngineConfig, checkpoint: Checkpoint, device: Device = CPU) -> Blueprint:
    """The same from files that are already open, or from a sketch of them."""
    manifest = Manifest.read(config.model_path)
    experts_per_token, scale = _experts_per_token(checkpoint, manifest, config.experts_per_token)
    model = build_meta_model(checkpoint, device.compute_dtype)
    modules, dense_keys = checkpoint.split_keys(model)
    most = min(entry.num_experts for entry in modules)
    if experts_per_token > most:
        raise StartError(
            f"--experts-per-token {experts_per_token}: the model has {most} experts per layer"
        )
    topology = trace(model)
    by_path = {entry.path: entry for entry in modules}
    experts = tuple(by_path[path] for path in topology.experts_paths)
    dtype, kind = device.compute_dtype, device.place.type
    codec = expert_codec(config.expert_format, experts, dtype, kind)
    return Blueprint(
        checkpoint, topology, experts, dense_keys, manifest, experts_per_token, scale, codec, device
    )


def _experts_per_token(
    checkpoint: Checkpoint, manifest: Manifest | None, wanted: int | None
) -> tuple[int, float]:
    """How many experts each token takes, and what their sum is multiplied with."""
    text_config = checkpoint.config.get_text_config()
    own = getattr(text_config, "num_experts_per_tok", None)
    if wanted is None or wanted == own:
        wanted = own if own is not None else 0
        return wanted, wanted / manifest.output_factor if manifest else 1.0
    if own is None:
        raise ModelRefused(
            f"--experts-per-token: models of type {text_config.model_type!r} do not have one number"
        )
    text_config.num_experts_per_tok = wanted
    if manifest is None:
        log.warning(
            "--experts-per-token %d instead of the model's own %d: answers will differ from the"
            " model's, and nothing rescales its outputs",
            wanted,
            own,
        )
        return wanted, 1.0
    return wanted, wanted / manifest.output_factor


def plan_memory(config: EngineConfig, blueprint: Blueprint, *, packing: bool = False) -> MemoryPlan:
    """With `packing`, the pack has to be built first. Raises BudgetTooSmall with the arithmetic.

    How long steps are moves the last bits of long prompts, so it is chosen as if all of the limit
    were free: it is the same at every start. The budgets are then what is available now.
    """
    spec, limit = blueprint.spec, memory_limit()
    demand = _demand(config, blueprint, spec, packing)
    own_bytes = demand.interpreter_bytes + _files_bytes(config, spec, packing=False)

    def planned(step_tokens: int, memory: HostMemory) -> MemoryPlan:
        workspace = _workspace_bytes(config, blueprint, demand, step_tokens)
        asked = replace(demand, workspace_bytes=workspace, step_tokens=step_tokens)
        return _settled(config, blueprint, spec, asked, memory)

    def plan(step_tokens: int) -> MemoryPlan:
        return planned(step_tokens, HostMemory(limit))

    if config.max_step_tokens is not None:
        chosen = plan_given_steps(plan, config.max_step_tokens)
    else:
        slots_bytes = None if config.link is None else config.device_memory_bytes
        chosen = plan_best_steps(plan, slots_bytes)
    now = HostMemory(limit, memory_available() + own_bytes)
    settled = planned(chosen.demand.step_tokens, now)
    reason = chosen.step_reason
    if settled.experts_bytes < chosen.experts_bytes:
        reason += " (were all of the limit free; it is the same at every start)"
    return replace(settled, step_reason=reason)


def _files_bytes(config: EngineConfig, spec: PackSpec, *, packing: bool) -> int:
    """Of the cache and the model's folder where these are memory; with a pack that is to come."""
    folders = {config.cache_dir, config.model_path}
    inside = {each for each in folders if config.cache_dir in each.parents}
    found = sum(_held_bytes(each) for each in folders - inside if is_in_memory(each))
    return found + (spec.total_bytes if packing and is_in_memory(config.cache_dir) else 0)


def _held_bytes(folder: Path) -> int:
    """What the files below `folder` take. Files that vanish meanwhile take nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += BLOCK_BYTES * os.lstat(Path(base, name)).st_blocks
    return total


def _demand(config: EngineConfig, blueprint: Blueprint, spec: PackSpec, packing: bool) -> Demand:
    """All but the workspace, which follows from the step. Raises BudgetTooSmall."""
    topology = blueprint.topology
    least = max(topology.experts_per_token)
    own_context = _own_context_tokens(blueprint)
    wanted_context = config.max_model_len_tokens or own_context
    if wanted_context > own_context:
        raise BudgetTooSmall(
            f"--max-model-len {wanted_context}: the model's own limit is {own_context} tokens"
        )
    dense_bytes = _dense_bytes(config, blueprint)
    loading_bytes = 2 * _largest_bytes(blueprint)  # in two forms
    if blueprint.device.room is None:  # else the dense weights are never here as a whole
        loading_bytes += dense_bytes
    return Demand(
        interpreter_bytes=resident_bytes(),
        files_bytes=_files_bytes(config, spec, packing=packing),
        dense_bytes=dense_bytes,
        workspace_bytes=0,
        experts_total_bytes=spec.slot_bytes * spec.num_experts,
        experts_least_bytes=spec.slot_bytes * (least if config.link is None else LEAST_HOST_SLOTS),
        kv_bytes_per_token=topology.kv_numbers_per_token * blueprint.itemsize,
        context_tokens=wanted_context,
        packing_bytes=max(_packing_bytes(blueprint) if packing else 0, loading_bytes),
    )


def _settled(
    config: EngineConfig,
    blueprint: Blueprint,
    spec: PackSpec,
    demand: Demand,
    memory: HostMemory,
) -> MemoryPlan:
    """The budgets beside `demand`. Raises BudgetTooSmall."""
    wanted_context, least = demand.context_tokens, max(blueprint.topology.experts_per_token)
    if blueprint.device.room is None:
        plan = _in_host_memory(config, demand, spec, least, memory)
    else:
        plan = _apart(config, blueprint, blueprint.device.room, demand, memory)
    if config.max_model_len_tokens is not None and plan.kv_tokens < wanted_context:
        needed = round_up_tokens(wanted_context) * demand.kv_bytes_per_token
        raise BudgetTooSmall(
            f"--max-model-len {wanted_context} needs {human_bytes(needed)} of KV, the budget is"
            f" {human_bytes(plan.kv_bytes)}: raise --kv-memory or lower --max-model-len to"
            f" {plan.kv_tokens}"
        )
    return plan


def _in_host_memory(
    config: EngineConfig, demand: Demand, spec: PackSpec, least: int, memory: HostMemory
) -> MemoryPlan:
    host, slots = config.host_memory_bytes, demand.experts_least_bytes // spec.slot_bytes
    if host is not None:
        _check_slots("--host-memory", host, spec, slots)
    kv, now = config.kv_memory_bytes, memory.available_bytes
    plan = settle(demand, host, kv, memory.limit, available_bytes=now)
    if config.device_memory_bytes is None:
        return plan
    # An emulated device's slots take memory unless they only show the host's.
    device = _check_slots("--device-memory", config.device_memory_bytes, spec, least)
    if plan.experts_bytes >= demand.experts_total_bytes:
        return plan
    return settle(demand, host, kv, memory.limit, device.arena_bytes, available_bytes=now)


def _apart(
    config: EngineConfig, blueprint: Blueprint, room: Room, demand: Demand, memory: HostMemory
) -> MemoryPlan:
    """All that is computed from in a device's own memory; the host has its tier of experts."""
    spec, staging = blueprint.spec, blueprint.device.staging_bytes
    least = max(blueprint.topology.experts_per_token)
    if config.device_memory_bytes is not None:
        _check_slots("--device-memory", config.device_memory_bytes, spec, least)
    if config.host_memory_bytes is not None:
        _check_slots("--host-memory", config.host_memory_bytes, spec, LEAST_HOST_SLOTS, staging)
    there = replace(
        demand,
        interpreter_bytes=0,
        files_bytes=0,
        workspace_bytes=demand.workspace_bytes + DEVICE_ALLOWANCE_BYTES - ALLOWANCE_BYTES,
        packing_bytes=demand.dense_bytes + 2 * _largest_bytes(blueprint),
    )
    kv, wanted = config.kv_memory_bytes, config.device_memory_bytes
    plan = settle(there, wanted, kv, room.limit, kind=DEVICE_BUDGET)
    total = demand.experts_total_bytes
    # Behind a device that holds all, the host passes experts on: room to read a layer ahead.
    holds_all = plan.experts_bytes >= total
    wish = max(layer.num_experts for layer in spec.layers) * spec.slot_bytes if holds_all else total
    host = HostDemand(
        interpreter_bytes=demand.interpreter_bytes,
        experts_total_bytes=total,
        experts_least_bytes=LEAST_HOST_SLOTS * spec.slot_bytes + staging,
        experts_wish_bytes=wish + staging,
        staging_bytes=staging,
        packing_bytes=demand.packing_bytes,
        files_bytes=demand.files_bytes,
    )
    return replace(
        plan, host=settle_host(host, config.host_memory_bytes, memory.limit, memory.available_bytes)
    )


def _check_slots(
    flag: str, size_bytes: int, spec: PackSpec, least: int, staging_bytes: int = 0
) -> SlotPlan:
    """Raises BudgetTooSmall where a budget that was given holds fewer than `least` experts."""
    try:
        return plan_slots(size_bytes, spec, least, staging_bytes)
    except DoesNotFit as error:
        raise BudgetTooSmall(f"{flag}: {error}") from error


def _dense_bytes(config: EngineConfig, blueprint: Blueprint) -> int:
    """Dense weights in the compute dtype, less what int8 saves."""
    itemsize = blueprint.itemsize
    whole = blueprint.checkpoint.dense_bytes(blueprint.dense_keys, itemsize)
    model = build_meta_model(blueprint.checkpoint, blueprint.device.compute_dtype)
    return whole - saved_bytes(model, compact_modules(config, blueprint, model), itemsize)


def compact_modules(
    config: EngineConfig, blueprint: Blueprint, model: PreTrainedModel
) -> list[Replacement]:
    """Modules of `model` that take fewer bytes than the compute dtype would."""
    return replacements(
        model,
        blueprint.topology.router_paths,
        config.dense_format,
        blueprint.checkpoint,
        tiled=in_tiles(blueprint.device.compute_dtype, blueprint.device.place.type),
    )


def _largest_bytes(blueprint: Blueprint) -> int:
    """Of the dense tensors."""
    checkpoint = blueprint.checkpoint
    return max(checkpoint.dense_bytes([key], blueprint.itemsize) for key in blueprint.dense_keys)


def _packing_bytes(blueprint: Blueprint) -> int:
    """One layer's experts as they come, stacked and joined, and as the pack wants them."""
    largest = max(entry.expert_bytes * entry.num_experts for entry in blueprint.experts)
    encoded = max(layer.total_bytes for layer in blueprint.spec.layers)
    return int(PACKING_COPIES * largest) + encoded + ALLOWANCE_BYTES


def _own_context_tokens(blueprint: Blueprint) -> int:
    """The model's own limit; for rope types that choose their frequencies by the length of the

    whole row, the length up to which that choice is the same for every sequence in it.
    """
    config = blueprint.checkpoint.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 4096)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return longest
    original = rope.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None)
    log.info("context: longrope is carried up to its original length, %s tokens", original)
    return min(longest, int(original or longest))


def _workspace_bytes(
    config: EngineConfig, blueprint: Blueprint, demand: Demand, step_tokens: int
) -> int:
    """What one step takes beside weights and KV, from the widths of the model."""
    text_config = blueprint.checkpoint.config.get_text_config()
    hidden = int(text_config.hidden_size)
    width = max(
        [4 * hidden]
        + [max(shape[1:]) for entry in blueprint.experts for _, shape in entry.tensors.values()]
    )
    per_token = 4 * (max(blueprint.topology.experts_per_token) * hidden + 6 * hidden + 3 * width)
    logits = 4 * config.max_running * blueprint.vocab_size
    widened = max(
        4 * torch.Size(shape[1:]).numel()
        for entry in blueprint.experts
        for _, shape in entry.tensors.values()
    )
    kv_bytes = config.kv_memory_bytes or DEFAULT_KV_BYTES
    seen = min(demand.context_tokens, kv_bytes // demand.kv_bytes_per_token)
    fixed = ALLOWANCE_BYTES + logits + widened
    if blueprint.device.room is not None:
        fixed += _repeated_heads_bytes(blueprint, seen)
    return fixed + step_tokens * (per_token + MASK_BYTES * seen)


def _repeated_heads_bytes(blueprint: Blueprint, context: int) -> int:
    """Keys and values of one sequence and layer, once for every query head (attention.py)."""
    text_config, topology = blueprint.checkpoint.config.get_text_config(), blueprint.topology
    heads = int(getattr(text_config, "num_attention_heads", 1))
    key_heads = int(getattr(text_config, "num_key_value_heads", None) or heads)
    numbers = topology.kv_numbers_per_token // topology.attention_layers * heads // key_heads
    return numbers * blueprint.itemsize * context
