"""A model understood and its memory planned, before anything is loaded."""

import logging
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import PreTrainedModel

from moestro.cache import LEAST_HOST_SLOTS, DoesNotFit, PackSpec, human_bytes, plan_slots

from .checkpoint import Checkpoint, ExpertsModule
from .config import EngineConfig
from .dense import Replacement, replacements, saved_bytes
from .errors import BudgetTooSmall, ModelRefused, StartError
from .formats import Codec
from .manifest import Manifest
from .memory import (
    ALLOWANCE_BYTES,
    DEFAULT_KV_BYTES,
    Demand,
    MemoryPlan,
    memory_limit,
    settle,
)
from .mixed import expert_codec, pack_layer
from .sequence import round_up_tokens
from .step_size import plan_best_steps, plan_given_steps
from .topology import Topology, trace

log = logging.getLogger("moestro.engine")

COMPUTE_DTYPE = torch.float32
PACKING_COPIES = 2.5  # of one layer, while transformers converts it: 2.3 seen
# Of a token and one that it may see: two masks of booleans, and one of them as a product wants it.
MASK_BYTES = 6


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

    @property
    def vocab_size(self) -> int:
        return int(self.checkpoint.config.get_text_config().vocab_size)

    @property
    def num_layers(self) -> int:
        return int(self.checkpoint.config.get_text_config().num_hidden_layers)

    @property
    def spec(self) -> PackSpec:
        """The pack that this model needs."""
        layers = tuple(pack_layer(self.codec, entry) for entry in self.experts)
        return PackSpec(self.checkpoint.fingerprint(), self.codec.name, layers)


def inspect(config: EngineConfig) -> Blueprint:
    """Understand the model without loading it. Raises ModelNotFound or ModelRefused."""
    return understand(config, Checkpoint(config.model_path))


def understand(config: EngineConfig, checkpoint: Checkpoint) -> Blueprint:
    """The same from files that are already open, or from a sketch of them."""
    manifest = Manifest.read(config.model_path)
    experts_per_token, scale = _experts_per_token(checkpoint, manifest, config.experts_per_token)
    model = checkpoint.build_meta_model(COMPUTE_DTYPE)
    modules, dense_keys = checkpoint.split_keys(model)
    most = min(entry.num_experts for entry in modules)
    if experts_per_token > most:
        raise StartError(
            f"--experts-per-token {experts_per_token}: the model has {most} experts per layer"
        )
    topology = trace(model)
    by_path = {entry.path: entry for entry in modules}
    experts = tuple(by_path[path] for path in topology.experts_paths)
    codec = expert_codec(config.expert_format, experts, COMPUTE_DTYPE)
    return Blueprint(
        checkpoint, topology, experts, dense_keys, manifest, experts_per_token, scale, codec
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
    """With `packing`, the pack has to be built first. Raises BudgetTooSmall with the arithmetic."""
    spec = blueprint.spec
    demand = _demand(config, blueprint, spec, packing)

    def plan(step_tokens: int) -> MemoryPlan:
        workspace = _workspace_bytes(config, blueprint, demand, step_tokens)
        asked = replace(demand, workspace_bytes=workspace, step_tokens=step_tokens)
        return _settled(config, blueprint, spec, asked)

    if config.max_step_tokens is not None:
        return plan_given_steps(plan, config.max_step_tokens)
    return plan_best_steps(plan, None if config.link is None else config.device_memory_bytes)


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
    itemsize, dense_bytes = COMPUTE_DTYPE.itemsize, _dense_bytes(config, blueprint)
    loading_bytes = _loading_bytes(blueprint, dense_bytes)
    return Demand(
        interpreter_bytes=psutil.Process().memory_info().rss,
        dense_bytes=dense_bytes,
        workspace_bytes=0,
        experts_total_bytes=spec.slot_bytes * spec.num_experts,
        experts_least_bytes=spec.slot_bytes * (least if config.link is None else LEAST_HOST_SLOTS),
        kv_bytes_per_token=topology.kv_numbers_per_token * itemsize,
        context_tokens=wanted_context,
        packing_bytes=max(_packing_bytes(blueprint) if packing else 0, loading_bytes),
    )


def _settled(
    config: EngineConfig, blueprint: Blueprint, spec: PackSpec, demand: Demand
) -> MemoryPlan:
    """The budgets beside `demand`. Raises BudgetTooSmall."""
    wanted_context, least = demand.context_tokens, max(blueprint.topology.experts_per_token)
    if config.host_memory_bytes is not None:
        try:
            plan_slots(
                config.host_memory_bytes, spec, demand.experts_least_bytes // spec.slot_bytes
            )
        except DoesNotFit as error:
            raise BudgetTooSmall(f"--host-memory: {error}") from error
    plan = settle(demand, config.host_memory_bytes, config.kv_memory_bytes, memory_limit())
    if config.device_memory_bytes is not None:
        plan = _with_device(config, plan, spec, least)
    if config.max_model_len_tokens is not None and plan.kv_tokens < wanted_context:
        needed = round_up_tokens(wanted_context) * demand.kv_bytes_per_token
        raise BudgetTooSmall(
            f"--max-model-len {wanted_context} needs {human_bytes(needed)} of KV, the budget is"
            f" {human_bytes(plan.kv_bytes)}: raise --kv-memory or lower --max-model-len to"
            f" {plan.kv_tokens}"
        )
    return plan


def _with_device(config: EngineConfig, plan: MemoryPlan, spec: PackSpec, least: int) -> MemoryPlan:
    """The plan with the slots of an emulated device, which take memory unless they only show the

    host's (where the host holds all experts). Raises BudgetTooSmall.
    """
    assert config.device_memory_bytes is not None
    try:
        device = plan_slots(config.device_memory_bytes, spec, least)
    except DoesNotFit as error:
        raise BudgetTooSmall(f"--device-memory: {error}") from error
    if plan.experts_bytes >= plan.demand.experts_total_bytes:
        return plan
    host, kv = config.host_memory_bytes, config.kv_memory_bytes
    return settle(plan.demand, host, kv, memory_limit(), device.arena_bytes)


def _dense_bytes(config: EngineConfig, blueprint: Blueprint) -> int:
    """Dense weights in the compute dtype, less what int8 saves."""
    itemsize = COMPUTE_DTYPE.itemsize
    whole = blueprint.checkpoint.dense_bytes(blueprint.dense_keys, itemsize)
    model = blueprint.checkpoint.build_meta_model(COMPUTE_DTYPE)
    return whole - saved_bytes(model, compact_modules(config, blueprint, model), itemsize)


def compact_modules(
    config: EngineConfig, blueprint: Blueprint, model: PreTrainedModel
) -> list[Replacement]:
    """Modules of `model` that take fewer bytes than the compute dtype would."""
    return replacements(model, blueprint.topology, config.dense_format, blueprint.checkpoint)


def _loading_bytes(blueprint: Blueprint, dense_bytes: int) -> int:
    """The dense weights while the largest one is there in two forms."""
    checkpoint = blueprint.checkpoint
    largest = max(
        checkpoint.dense_bytes([key], COMPUTE_DTYPE.itemsize) for key in blueprint.dense_keys
    )
    return dense_bytes + 2 * largest


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
    return ALLOWANCE_BYTES + step_tokens * (per_token + MASK_BYTES * seen) + logits + widened
