"""What all parts of a model take, held against the machine: the memory plan, or a refusal."""

import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from moestro.cache import (
    LEAST_HOST_SLOTS,
    DoesNotFit,
    PackSpec,
    SlotPlan,
    human_bytes,
    plan_slots,
)
from moestro.engine.facts import (
    BudgetTooSmall,
    EngineConfig,
    Lane,
    Room,
    round_up_tokens,
)
from moestro.engine.formats import MixedCodec
from moestro.engine.model import GPU_SINK_BLOCK_BYTES
from moestro.engine.weights import ON_HOST, saved_bytes

from .blueprint import Blueprint, compact_modules, kept_dense
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

# Of a token and one that it may see: two masks of booleans, and one of them as a product wants it.
MASK_BYTES = 6
SCORE_COPIES = 2  # scores and their softmax
PACKING_COPIES = 2.5  # of one layer, while transformers converts it: 2.3 seen
BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own are


def plan_memory(
    config: EngineConfig,
    blueprint: Blueprint,
    *,
    packing: bool = False,
    machine: HostMemory | None = None,
) -> MemoryPlan:
    """With `packing`, the pack has to be built first; `machine`: another one's memory than this's.

    Raises BudgetTooSmall with the arithmetic.

    How long steps are moves the last bits of long prompts, so it is chosen as if all of the limit
    were free: it is the same at every start. The budgets are then what is available now.
    """
    spec, limit = blueprint.spec, memory_limit() if machine is None else machine.limit
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
    now = machine or HostMemory(limit, memory_available() + own_bytes)
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
    """What the files below `folder` take, or it itself where it is one.

    Files that vanish meanwhile take nothing.
    """
    total = BLOCK_BYTES * os.lstat(folder).st_blocks if folder.is_file() else 0
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
    dense_bytes, host_dense_bytes = _dense_bytes(config, blueprint)
    return Demand(
        interpreter_bytes=resident_bytes(),
        files_bytes=_files_bytes(config, spec, packing=packing),
        dense_bytes=dense_bytes,
        host_dense_bytes=host_dense_bytes,
        workspace_bytes=0,
        experts_total_bytes=spec.slot_bytes * spec.num_experts,
        experts_least_bytes=spec.slot_bytes * (least if config.link is None else LEAST_HOST_SLOTS),
        kv_bytes_per_token=topology.kv_numbers_per_token * blueprint.itemsize,
        context_tokens=wanted_context,
        packing_bytes=max(
            _packing_bytes(blueprint) if packing else 0,
            _loading_bytes(config, blueprint, dense_bytes),
        ),
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
        pinned=blueprint.device.place.type == "cuda",
        dense_bytes=demand.host_dense_bytes,
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


def _dense_bytes(config: EngineConfig, blueprint: Blueprint) -> tuple[int, int]:
    """Of dense weights in the compute dtype, less what int8 saves: where the model computes, and

    those that a device of its own leaves to the host.
    """
    itemsize = blueprint.itemsize
    whole = blueprint.checkpoint.dense_bytes(blueprint.dense_keys, itemsize)
    model = blueprint.build_model()
    found = compact_modules(config, blueprint, model)
    on_host = sum(itemsize * each.numbers for each in found if each.kind == ON_HOST)
    return whole - saved_bytes(model, found, itemsize), on_host


def _largest_bytes(blueprint: Blueprint) -> int:
    """Of the dense tensors."""
    checkpoint = blueprint.checkpoint
    return max(checkpoint.dense_bytes([key], blueprint.itemsize) for key in blueprint.dense_keys)


def _loading_bytes(config: EngineConfig, blueprint: Blueprint, dense_bytes: int) -> int:
    """Of the dense weights, at the most: one tensor in two forms beside what is ready."""
    kept = kept_dense(config, blueprint)
    if kept is not None and kept.is_kept():
        return dense_bytes  # read into place, in the form that is computed with
    two_forms = 2 * _largest_bytes(blueprint)
    # on a device of its own the dense weights are never here as a whole
    return two_forms + (dense_bytes if blueprint.device.room is None else 0)


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
    widened = _widened_bytes(blueprint)
    kv_bytes = config.kv_memory_bytes or DEFAULT_KV_BYTES
    seen = min(demand.context_tokens, kv_bytes // demand.kv_bytes_per_token)
    topology = blueprint.topology
    states = config.max_running * topology.kv_fixed_numbers * blueprint.itemsize
    fixed = ALLOWANCE_BYTES + logits + widened + states
    if topology.lane.lane is Lane.SEQUENTIAL:  # a layer that is being joined with its new rows
        fixed += 2 * seen * demand.kv_bytes_per_token // topology.attention_layers
    elif blueprint.device.place.type != "cpu":
        fixed += _repeated_heads_bytes(blueprint, seen) + _sinks_bytes(blueprint, seen)
    fixed += _repeated_rows(config, blueprint) * per_token
    of_a_pair = _mask_bytes(blueprint) + _scores_bytes(blueprint)
    return fixed + step_tokens * (per_token + of_a_pair * seen)


def _widened_bytes(blueprint: Blueprint) -> int:
    """One matrix of an expert in the numbers that it is computed with; on a GPU, where a format
    has no product of its own for many rows, or is kept in smaller numbers.
    """
    matrices = [
        (dtype, torch.Size(shape[1:]).numel())
        for entry in blueprint.experts
        for dtype, shape in entry.tensors.values()
    ]
    largest = max(count for _, count in matrices)
    if blueprint.device.place.type == "cpu":
        return 4 * largest
    codec = blueprint.codec
    names = {each.name for each in (codec.codecs if isinstance(codec, MixedCodec) else [codec])}
    smaller = any(dtype.itemsize < blueprint.itemsize for dtype, _ in matrices)
    widens = "nf4" in names or ("native" in names and smaller)
    return blueprint.itemsize * largest if widens else 0


def _mask_bytes(blueprint: Blueprint) -> int:
    """Of a token and one that it may see; a GPU needs no mask for plain causality."""
    topology = blueprint.topology
    masked = topology.ruled_masks or topology.block_masks or topology.lane.lane is Lane.SEQUENTIAL
    return MASK_BYTES if masked or blueprint.device.place.type == "cpu" else 0


def _sinks_bytes(blueprint: Blueprint, context: int) -> int:
    """Of scores that a GPU writes out a block at a time (attention.py): fp32, and as they come."""
    if not any(key.endswith(".sinks") for key in blueprint.dense_keys):
        return 0
    text_config = blueprint.checkpoint.config.get_text_config()
    row_bytes = 4 * int(text_config.num_attention_heads) * context
    return SCORE_COPIES * max(GPU_SINK_BLOCK_BYTES, row_bytes)


def _repeated_rows(config: EngineConfig, blueprint: Blueprint) -> int:
    """Rows that experts are given beyond a step's tokens, where all that sequences keep run."""
    if blueprint.manifest is None:
        return 0
    least, most = blueprint.experts_per_token, max(each.num_experts for each in blueprint.experts)
    return config.max_running * ((most - 1) // least)


def _scores_bytes(blueprint: Blueprint) -> int:
    """Of a token and one that it may see, where the stock attention writes its scores out."""
    if not blueprint.topology.writes_scores:
        return 0
    text_config = blueprint.checkpoint.config.get_text_config()
    heads = [getattr(text_config, name, None) for name in ("num_attention_heads", "index_n_heads")]
    return SCORE_COPIES * max(int(count or 1) for count in heads) * blueprint.itemsize


def _repeated_heads_bytes(blueprint: Blueprint, context: int) -> int:
    """Keys and values of one sequence and layer, once for every query head (attention.py).

    Of what has masks, and of all where a device's kernels do not group heads.
    """
    text_config, topology = blueprint.checkpoint.config.get_text_config(), blueprint.topology
    heads = int(getattr(text_config, "num_attention_heads", 1))
    key_heads = int(getattr(text_config, "num_key_value_heads", None) or heads)
    if blueprint.device.grouped_heads and not (topology.ruled_masks or topology.block_masks):
        return 0
    numbers = topology.kv_numbers_per_token // topology.attention_layers * heads // key_heads
    return numbers * blueprint.itemsize * context
