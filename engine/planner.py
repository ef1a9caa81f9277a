"""`moestro plan`: the start's own memory plan and what to expect of it, before anything is loaded.

For this machine's CPU, or for a GPU that is here or only planned for.

Needs config.json; uses the weight index and the headers of the weight files where they are.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moestro.cache import (
    NextUse,
    PackSpec,
    Phase,
    TraceInvalid,
    TraceReader,
    belady,
    human_bytes,
    plan_slots,
    plan_tiers,
    replay,
)
from moestro.engine.facts import (
    CPU,
    BudgetTooSmall,
    Device,
    EngineConfig,
    ModelNotFound,
    StartError,
    choose,
    planned_card,
    set_threads,
)
from moestro.engine.forecasts import (
    FINEST_FIRST,
    PCIE_4_BYTES_PER_S,
    CardForecast,
    CardLinks,
    ComputeSpeed,
    Forecast,
    FormatShare,
    LinkSpeed,
    Matrices,
    MoeLayer,
    Rates,
    Traced,
    Understood,
    Work,
    flags_of,
    gains_of,
    measure_link,
    measure_multiply,
    nearest_plan,
    own_grid_line,
    share_of,
    understand_settled,
)
from moestro.engine.formats import codec_of, in_tiles
from moestro.engine.kernels import chosen, set_pool_threads
from moestro.engine.planning import (
    Blueprint,
    HostMemory,
    MemoryPlan,
    Sketch,
    StoredWeights,
    check_config,
    plan_memory,
    weights_are_here,
)
from moestro.engine.weights import Checkpoint, weight_files

from .choices import check_choices

TORCH = "torch"  # whose products serve where this build has none of its own


def plan_model(
    config: EngineConfig,
    disk_bytes_per_s: float | None = None,
    trace: Path | None = None,
    stored: StoredWeights | None = None,
) -> Forecast:
    """Takes about a second of measuring; `disk_bytes_per_s` spares the disk's part of it.

    `stored` is what is known of weights that are not here; where they are, it is not looked at.
    With a recorded `trace` of the model, hit rates are those of its replay in the planned slots.

    Raises StartError as the start would; where budgets contradict, with the nearest plan that fits.
    """
    check_choices(config)
    if config.link is not None:
        raise StartError("--emulate-link: a plan is for real links; it is for serving alone")
    threads = set_threads(config.threads).count
    set_pool_threads(threads)
    here, checkpoint = _opened(config.model_path, stored)
    try:
        understood = understand_settled(config, checkpoint, CPU)
        config, blueprint = understood.config, understood.blueprint
        plan = _plan(config, blueprint)
        work = _work(blueprint, plan.demand.step_tokens)
        gains = gains_of(config, blueprint)
        quantized = own_grid_line(config, blueprint)
        spec = blueprint.spec
    finally:
        checkpoint.close()
    slots = plan_slots(plan.experts_bytes, spec, max(blueprint.topology.experts_per_token))
    traced = _replayed(trace, spec, slots.slots) if trace is not None else None
    return Forecast(
        family=str(checkpoint.config.model_type),
        stored_dtype=str(_matrices(blueprint)[0][0]).removeprefix("torch."),
        expert_format=config.format_name,
        dense_format=config.dense_format,
        has_weights=here,
        factorized=blueprint.manifest is not None,
        plan=plan,
        slots=slots.slots,
        slot_bytes=slots.slot_bytes,
        work=work,
        link=_link(config, spec.slot_bytes, disk_bytes_per_s),
        compute=_compute(config, blueprint, work, threads),
        gains=gains,
        lane=blueprint.topology.lane,
        traced=traced,
        quantized=quantized,
        format_reason=understood.reason,
    )


def card_of(config: EngineConfig) -> Device | None:
    """The GPU that a plan is for; None: it is for this machine's CPU.

    A config with `device_memory_bytes` is for a card with so much memory, which need not be here.
    Raises StartError.
    """
    wanted = config.device != "cpu"
    if wanted and config.device_memory_bytes is not None:
        return planned_card(config.device_memory_bytes)
    try:
        device = choose(config)
    except StartError as error:
        raise StartError(
            f"{error}; to plan for a card that is not here, say how much memory it has:"
            " --device-memory 12GiB"
        ) from error
    return device if device.room is not None else None


def plan_card(
    config: EngineConfig,
    card: Device,
    link_bytes_per_s: float | None = None,
    disk_bytes_per_s: float | None = None,
    stored: StoredWeights | None = None,
    machine: HostMemory | None = None,
) -> CardForecast:
    """What `card` (from `card_of`) would hold of the model's experts, and what its links allow.

    All of the card that is free is planned with. Nothing is measured but the disk, which
    `disk_bytes_per_s` spares. `machine`: another host's memory than this one's.

    Raises StartError as `plan_model` does.
    """
    check_choices(config)
    config = replace(config, device="cuda", device_memory_bytes=None)
    here, checkpoint = _opened(config.model_path, stored)
    try:
        understood = understand_settled(config, checkpoint, card, machine)
        config, blueprint = understood.config, understood.blueprint
        plan = _plan(config, blueprint, machine)
        work = _work(blueprint, plan.demand.step_tokens)
        formats = _other_shares(understood, machine)
        spec = blueprint.spec
        disk = _link(config, spec.slot_bytes, disk_bytes_per_s)
        quantized = own_grid_line(config, blueprint)
    finally:
        checkpoint.close()
    assert plan.host is not None, "a card has memory of its own"
    per_token = max(blueprint.topology.experts_per_token)
    tiers = plan_tiers(
        plan.experts_bytes, plan.host.experts_bytes, spec, per_token, card.staging_bytes
    )
    assert tiers.device is not None
    said = link_bytes_per_s is not None
    return CardForecast(
        family=str(checkpoint.config.model_type),
        stored_dtype=str(_matrices(blueprint)[0][0]).removeprefix("torch."),
        expert_format=config.format_name,
        dense_format=config.dense_format,
        has_weights=here,
        plan=plan,
        slots=tiers.device.slots,
        host_slots=tiers.host.slots,
        slot_bytes=spec.slot_bytes,
        work=work,
        links=CardLinks(
            into_card_bytes_per_s=link_bytes_per_s or PCIE_4_BYTES_PER_S,
            into_card_source="--link" if said else "PCIe 4 x16, assumed: --link",
            disk_bytes_per_s=disk.scattered_bytes_per_s,
            disk_source=disk.source,
        ),
        lane=blueprint.topology.lane,
        formats=formats,
        quantized=quantized,
        format_reason=understood.reason,
    )


def _opened(folder: Path, stored: StoredWeights | None) -> tuple[bool, Checkpoint]:
    """Whether the weight files are here, and them or a sketch."""
    here = weights_are_here(folder)
    return here, Checkpoint(folder) if here else Sketch(folder, stored)


def _other_shares(model: Understood, machine: HostMemory | None) -> tuple[FormatShare, ...]:
    """Of the experts on the card, in every format but the one that is planned with."""
    known = {one.expert_format: one for one in model.shares}
    return tuple(
        known.get(name)
        or share_of(replace(model.config, expert_format=name), model.blueprint, machine)
        for name in FINEST_FIRST
        if name != model.config.format_name
    )


def verdict(config: EngineConfig) -> str:
    """A line: whether a start would fit, with how many experts resident. Measures nothing."""
    try:
        check_choices(config)
        here = weights_are_here(config.model_path)
        checkpoint = Checkpoint(config.model_path) if here else Sketch(config.model_path)
        try:
            understood = understand_settled(config, checkpoint, CPU)
            config, blueprint = understood.config, understood.blueprint
            plan = _plan(config, blueprint)
        finally:
            checkpoint.close()
        least = max(blueprint.topology.experts_per_token)
        slots = plan_slots(plan.experts_bytes, blueprint.spec, least)
    except StartError as error:
        return f"refused: {error}"
    total = blueprint.spec.num_experts
    return f"fits: {human_bytes(plan.total_bytes)}, {slots.slots} of {total} experts resident"


def refuse_by_config(config: EngineConfig) -> None:
    """Raises StartError as a start would, where the folder's config says already that it will.

    For models of which no weights are here yet: before they are fetched.
    """
    check_choices(config)
    sketch = Sketch(config.model_path)
    try:
        check_config(config, sketch)
    finally:
        sketch.close()


def _plan(
    config: EngineConfig, blueprint: Blueprint, machine: HostMemory | None = None
) -> MemoryPlan:
    packing = not config.pack_path.exists()  # as the start asks

    def plan(tried: EngineConfig) -> MemoryPlan:
        return plan_memory(tried, blueprint, packing=packing, machine=machine)

    try:
        return plan(config)
    except BudgetTooSmall as error:
        near = nearest_plan(config, plan)
        if near is None:
            raise BudgetTooSmall(f"{error}; no budgets would fit") from error
        total = human_bytes(plan(near).total_bytes)
        raise BudgetTooSmall(
            f"{error}; the nearest plan that fits: {flags_of(near)} ({total} in all)"
        ) from error


def _replayed(path: Path, spec: PackSpec, slots: int) -> Traced:
    """Raises StartError where the trace is none, or one of another model."""
    counts = [layer.num_experts for layer in spec.layers]
    try:
        events = TraceReader(path)
        if events.header.experts_per_layer != counts:
            raise StartError(f"--trace {path}: recorded on a model with other experts")
        low, high = replay(events, counts, slots, NextUse()), belady(events, counts, slots)
    except TraceInvalid as error:
        raise StartError(f"--trace {error}") from error

    def rates(phase: Phase, asked: int) -> Rates | None:
        return (low.hit_rate(phase), high.hit_rate(phase)) if asked else None

    return Traced(
        decode=rates(Phase.DECODE, sum(one.hits + one.misses for one in low.decode)),
        prefill=rates(Phase.PREFILL, sum(one.hits + one.misses for one in low.prefill)),
    )


def _matrices(blueprint: Blueprint) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of one expert's matrices, as the files have them."""
    tensors = blueprint.experts[0].tensors.values()
    return [(dtype, shape[1:]) for dtype, shape in tensors if len(shape) == 3]


def _work(blueprint: Blueprint, step_tokens: int) -> Work:
    """Which weights a token is multiplied with: all but the embedding, which is looked up."""
    model = blueprint.build_model()
    layers = tuple(
        MoeLayer(
            num_experts=entry.num_experts,
            experts_per_token=chosen,
            blob_bytes=packed.total_bytes // packed.num_experts,
            numbers=sum(
                torch.Size(shape[1:]).numel()
                for _, shape in entry.tensors.values()
                if len(shape) == 3
            ),
        )
        for entry, packed, chosen in zip(
            blueprint.experts,
            blueprint.spec.layers,
            blueprint.topology.experts_per_token,
            strict=True,
        )
    )
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    both = {id(part.weight): part.weight.numel() for part in (table, head) if part is not None}
    numbers = blueprint.checkpoint.dense_bytes(blueprint.dense_keys, 1)
    return Work(
        layers=layers,
        dense_numbers=max(0, numbers - sum(both.values())),
        head_numbers=head.weight.numel() if head is not None else 0,
        chunk_tokens=step_tokens,
    )


def _weights(folder: Path) -> list[Path]:
    """None where only the config is there."""
    try:
        return weight_files(folder)
    except ModelNotFound:
        return []


def _link(config: EngineConfig, blob_bytes: int, said_bytes_per_s: float | None) -> LinkSpeed:
    if said_bytes_per_s is not None:
        return LinkSpeed(said_bytes_per_s, said_bytes_per_s, "--disk-speed")
    files = [config.pack_path, *_weights(config.model_path)]
    return measure_link(config.cache_dir, blob_bytes, files)


def _compute(config: EngineConfig, blueprint: Blueprint, work: Work, threads: int) -> ComputeSpeed:
    """With the threads, shapes and formats that serving would have."""
    hidden = int(blueprint.checkpoint.config.get_text_config().hidden_size)
    # As the files have it where it lies in tiles, else widened.
    stored = _matrices(blueprint)[0][0] if in_tiles(CPU.compute_dtype) else CPU.compute_dtype
    dense = Matrices(
        {"dense": (stored, (4 * hidden, hidden))}, False, work.dense_numbers + hidden**2
    )
    first = blueprint.experts[0]
    experts = Matrices(
        {f"matrix{place}": entry for place, entry in enumerate(_matrices(blueprint))},
        first.transposed,
        sum(layer.num_experts * layer.numbers for layer in work.layers),
    )
    dense_codec = codec_of(config.dense_format, CPU.compute_dtype)
    tokens, share = work.chunk_tokens, work.mean_experts_per_token * len(work.layers)
    rows = max(1, round(tokens * share / work.total_experts))
    return ComputeSpeed(
        dense_decode=measure_multiply(dense_codec, dense, 1),
        dense_prefill=measure_multiply(dense_codec, dense, tokens),
        expert_decode=measure_multiply(blueprint.codec, experts, 1),
        expert_prefill=measure_multiply(blueprint.codec, experts, rows),
        threads=threads,
        products=chosen() or TORCH,
    )
