"""From a model folder to an engine that can step: check, plan, pack, load, bind, check itself.

Everything that can be refused is refused before memory is taken. Long parts report progress.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import PreTrainedModel

from moestro.cache import (
    ExpertCache,
    Phase,
)
from moestro.engine.facts import (
    SEQUENCE_CHOICES,
    Device,
    EngineConfig,
    EngineStats,
    Lane,
    ModelInfo,
    PrefetchStats,
    ProgressFn,
    SelectionStats,
    StartError,
    TorchThreads,
    choose,
    set_threads,
    unused_gpu,
)
from moestro.engine.forecasts import understand_settled
from moestro.engine.formats import ExpertsModule, in_tiles
from moestro.engine.kernels import set_pool_threads
from moestro.engine.lanes import PackedLane, PassLane, SequentialLane, packed_lane
from moestro.engine.model import (
    MathByFlags,
    OffloadedExperts,
    Prefetch,
    Regret,
    StepPhase,
    Thinner,
    bind,
    next_gates,
)
from moestro.engine.planning import (
    Blueprint,
    MemoryPlan,
    plan_memory,
    release_freed_memory,
)
from moestro.engine.step import Engine, Runner, Scheduler, SchedulerLimits, no_copies
from moestro.engine.text import Tokenizer
from moestro.engine.weights import Checkpoint

from .choices import check_choices, check_device
from .found import log_found, log_plan, log_whole_prompts, settle_many_rows, warn_vocabulary
from .kept_folders import FolderLock, use_folder
from .phases import Phases
from .placement import host_share
from .selfcheck import Verdict, check_lane, compare_thin
from .sequence_experts import sequence_experts
from .weight_loading import load_weights

log = logging.getLogger("moestro.engine")

READS_S = 0.2  # for timing a few reads of one expert
WHOLE_PROMPTS = "whole prompts\n"  # in the kept verdict, of a class that takes no second chunk
NO_PREFETCH = PrefetchStats(on=False, pauses=0, gain_s=0.0, cost_s=0.0, layers=())

NO_SELECTION = SelectionStats(dict.fromkeys(SEQUENCE_CHOICES, 0), 0, 0)


@dataclass(slots=True)
class Loaded:
    """Everything that serves, with one `close`."""

    engine: Engine
    cache: ExpertCache
    tokenizer: Tokenizer
    info: ModelInfo
    plan: MemoryPlan
    load_s: dict[str, float]
    prefetch: Prefetch | None
    folder: FolderLock | None = None  # of the packs: nobody removes them meanwhile

    def stats(self) -> EngineStats:
        counters, scheduler = self.engine.counters, self.engine.scheduler
        selection = self.engine.runner.selection
        return EngineStats(
            requests_running=len(scheduler.running),
            requests_waiting=len(scheduler.waiting),
            requests_finished=dict(counters.finished),
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefill_steps=counters.prefill_steps,
            decode_steps=counters.decode_steps,
            kv_used_bytes=scheduler.kv_reserved_bytes,
            kv_capacity_bytes=self.plan.kv_bytes,
            corrupted_requests=counters.corrupted,
            load_s=dict(self.load_s),
            planned_bytes=self.plan.parts(),
            cache=self.cache.stats(),
            prefetch=NO_PREFETCH if self.prefetch is None else self.prefetch.stats(),
            selection=NO_SELECTION if selection is None else selection.stats(),
        )

    def close(self) -> None:
        self.cache.close()
        if self.folder is not None:
            self.folder.close()


def load(
    config: EngineConfig,
    progress: ProgressFn,
    prepare: Callable[[ProgressFn], Path] | None = None,
    choose_device: Callable[[EngineConfig], Device] = choose,
) -> Loaded:
    """Raises StartError or CacheError, with nothing half-written and no file open."""
    check_choices(config)
    device = choose_device(config)
    check_device(config, device)
    if (unused := unused_gpu(device)) is not None and config.link is None:
        log.warning("%s", unused)
    threads = set_threads(config.threads)
    set_pool_threads(threads.count)
    phases = Phases(progress)
    if prepare is not None:
        phases.enter("prepare")
        config = replace(config, model_path=prepare(progress))
        release_freed_memory()
    phases.enter("inspect")
    understood = understand_settled(config, Checkpoint(config.model_path), device)
    config, blueprint = understood.config, understood.blueprint
    if understood.reason is not None:
        log.info("%s", understood.reason)
    plan = plan_memory(config, blueprint, packing=not config.pack_path.exists())
    log_found(blueprint, config, threads)
    log_plan(config, blueprint, plan)
    tokenizer = Tokenizer(config.model_path)
    warn_vocabulary(tokenizer, blueprint.vocab_size)
    try:
        return _loaded(config, blueprint, plan, tokenizer, threads.count, phases)
    except torch.OutOfMemoryError as error:  # of a GPU that others have taken from meanwhile
        raise StartError(
            f"--device {config.device}: less memory is free there than was planned with; lower"
            f" --device-memory or --kv-memory ({str(error).splitlines()[0]})"
        ) from error


def _loaded(
    config: EngineConfig,
    blueprint: Blueprint,
    plan: MemoryPlan,
    tokenizer: Tokenizer,
    threads: int,
    phases: Phases,
) -> Loaded:
    """As planned. Raises as `load`, and torch.OutOfMemoryError."""
    with ExitStack() as undo:
        folder = use_folder(config, blueprint.family, blueprint.topology.lane.lane.value)
        undo.callback(folder.close)
        settle_many_rows(blueprint, config, threads)
        model, cache = load_weights(config, blueprint, plan, phases)
        undo.callback(cache.close)
        step = StepPhase()
        prefetch = _prefetch(config, blueprint, model, cache, step, threads)
        _bind(config, blueprint, model, cache, step, prefetch)
        phases.enter("check")
        step.phase = Phase.PREFILL  # what the check runs are prompts
        tiled = in_tiles(blueprint.device.compute_dtype, blueprint.device.place.type)
        lane = _lane(blueprint, model, _limits(config, plan).pages, tiled=tiled)
        whole_prompts = not _check_once(config, blueprint, lane)
        if whole_prompts:
            log_whole_prompts(plan)
        phases.leave()
        # rows of scores take two copies, where the plan has room for one of each sequence's logits
        head_rows = max(1, config.max_running // 2)
        torch_threads = TorchThreads(1 if tiled else threads, threads)
        selection = sequence_experts(config, blueprint, lane, step)
        runner = Runner(lane, step, head_rows, torch_threads, selection)
        limits = replace(
            _limits(config, plan), shares_prompt=lane.packs, whole_prompts=whole_prompts
        )
        loaded = _assemble(
            config, blueprint, plan, limits, runner, cache, tokenizer, phases.seconds, prefetch
        )
        loaded.folder = folder
        undo.pop_all()
    return loaded


def _prefetch(
    config: EngineConfig,
    blueprint: Blueprint,
    model: PreTrainedModel,
    cache: ExpertCache,
    step: StepPhase,
    threads: int,
) -> Prefetch | None:
    """None where nothing shall or can be guessed; the log says why."""
    if not config.prefetch:
        log.info("prefetch: off (--no-prefetch)")
        return None
    if cache.plan.holds_all:
        log.info("prefetch: off, every expert has a slot and is read once")
        return None
    gates = next_gates(model, blueprint.topology)
    known = sum(gate is not None for gate in gates)
    if known == 0:
        log.info("prefetch: off, no layer's router can be asked before its layer")
        return None
    read_s = median(cache.time_reads(READS_S))
    log.info(
        "prefetch: on, next-gate guess for %d of %d layers, at most %d experts read ahead;"
        " one takes %.2f ms",
        known,
        len(gates),
        config.prefetch_experts,
        1000 * read_s,
    )
    regret = Regret(read_s, cache.stats)
    # The clock of the thread does not see the work of torch's other ones.
    clock = time.thread_time if threads == 1 else time.perf_counter
    return Prefetch(gates, cache, step, config.prefetch_experts, regret, time.perf_counter, clock)


def _bind(
    config: EngineConfig,
    blueprint: Blueprint,
    model: PreTrainedModel,
    cache: ExpertCache,
    step: StepPhase,
    prefetch: Prefetch | None,
) -> None:
    maths, compute_below = MathByFlags(blueprint.codec), None
    if config.link is not None and config.host_compute:
        compute_below = host_share(config.link, blueprint)
    elif blueprint.device.room is not None:
        log.info("experts where they lie: off, every miss is copied (only emulated links split)")
    for layer, path in enumerate(blueprint.topology.experts_paths):
        module = model.get_submodule(path)
        math = maths.of(module)
        scale = blueprint.output_scale
        known = None
        if math.tiled:
            known = math.known_activation(module, _inner_width(blueprint.experts[layer]))
        offloaded = OffloadedExperts(
            layer, cache, step, math, scale, prefetch, compute_below, known
        )
        bind(module, offloaded)


def _inner_width(entry: ExpertsModule) -> int:
    """Outputs of the first matrix of its experts."""
    name = "gate_up_proj" if "gate_up_proj" in entry.tensors else "up_proj"
    _, shape = entry.tensors[name]
    return shape[2] if entry.transposed else shape[1]


def _assemble(
    config: EngineConfig,
    blueprint: Blueprint,
    plan: MemoryPlan,
    limits: SchedulerLimits,
    runner: Runner,
    cache: ExpertCache,
    tokenizer: Tokenizer,
    load_s: dict[str, float],
    prefetch: Prefetch | None,
) -> Loaded:
    context = plan.longest_tokens
    if context < plan.demand.context_tokens:
        log.info(
            "context: %d tokens, as many as --kv-memory holds (the model could take %d)",
            context,
            plan.demand.context_tokens,
        )
    selection = runner.selection
    engine = Engine(
        runner,
        Scheduler(limits, no_copies if selection is None else selection.copies_bytes),
        tokenizer,
        context,
        blueprint.vocab_size,
        lambda: _discard(config.pack_path),
        blueprint.device.fault,
    )
    manifest = blueprint.manifest
    info = ModelInfo(
        family=blueprint.checkpoint.config.model_type,
        max_model_len_tokens=context,
        vocab_size=blueprint.vocab_size,
        num_layers=blueprint.num_layers,
        moe_layers=len(blueprint.experts),
        num_experts=blueprint.experts[0].num_experts,
        experts_per_token=blueprint.experts_per_token,
        expert_bytes=blueprint.spec.slot_bytes,
        expert_format=config.format_name,
        lane=blueprint.topology.lane.lane.value,
        created_s=int(time.time()),
        neuron_layers=0 if selection is None else selection.neuron_layers,
        sequence_density=0.0 if manifest is None else manifest.sequence_density,
    )
    return Loaded(engine, cache, tokenizer, info, plan, load_s, prefetch)


def _limits(config: EngineConfig, plan: MemoryPlan) -> SchedulerLimits:
    return SchedulerLimits(
        config.max_running,
        config.max_waiting,
        plan.demand.step_tokens,
        plan.kv_bytes,
        plan.demand.kv_bytes_per_token,
    )


def _lane(blueprint: Blueprint, model: PreTrainedModel, pages: int, *, tiled: bool) -> PassLane:
    """With what the library can compute in one call (`tiled`) replaced."""
    if blueprint.topology.lane.lane is Lane.SEQUENTIAL:
        if tiled:
            Thinner(model, None)
        return SequentialLane(model)
    lane = packed_lane(model, blueprint.topology, pages)
    lane.cache.grouped_heads = blueprint.device.grouped_heads
    if tiled:
        compare_thin(lane.with_own_pages(2), blueprint.vocab_size)
    return lane


def _check_once(config: EngineConfig, blueprint: Blueprint, lane: PassLane) -> bool:
    """Whether prompts may come in chunks.

    The self-check reads experts, so its verdict on model, formats and versions is kept.
    """
    formats = f"{blueprint.codec.name} {config.dense_format}"
    device = f"{blueprint.device.place.type} {blueprint.device.compute_dtype}"
    versions = f"moestro {version('moestro')}, transformers {transformers.__version__}"
    verdict = f"{blueprint.spec.model} {formats} {device} {versions}\n"
    record = config.pack_path.with_suffix(f".{config.dense_format}.checked")
    if (kept := _read_note(record)) in (verdict.encode(), (verdict + WHOLE_PROMPTS).encode()):
        return kept == verdict.encode()
    exact = config.expert_format == config.dense_format == "native"
    coarse = not exact or blueprint.itemsize < 4
    found = _check(lane, blueprint.vocab_size, blueprint.device.compute_dtype, coarse=coarse)
    try:
        record.write_text(verdict if found.continues else verdict + WHOLE_PROMPTS, "utf-8")
    except OSError as error:  # the next start checks again: slower, not wrong
        log.warning("the self-check's verdict could not be kept: %s", error)
    return found.continues


def _check(lane: PassLane, vocab_size: int, compute_dtype: torch.dtype, *, coarse: bool) -> Verdict:
    own = lane.with_own_pages(3) if isinstance(lane, PackedLane) else lane
    found = check_lane(own, vocab_size, compute_dtype, coarse=coarse)
    what = "in company, in chunks and alone" if found.continues else "in company and alone"
    log.info("self-check: %s agree (relative difference %.1e)", what, found.worst)
    return found


def _read_note(path: Path) -> bytes | None:
    """None where it cannot be read: what is only a note is made anew, whatever became of it."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _discard(path: Path) -> str:
    """Take a damaged pack away, so that the next start builds it anew; what became of it."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"{path} could not be removed ({error.strerror}): remove it and start again"
    return f"{path} was removed: start again, it is built anew"
