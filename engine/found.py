"""What the log says of a model at its start; which products multiply many rows of it."""

import logging

from moestro.cache import human_bytes
from moestro.engine.facts import EngineConfig, Threads
from moestro.engine.forecasts import gains_of, own_grid_line
from moestro.engine.kernels import (
    GEMM_NOTE,
    MISSING,
    NEVER,
    TILE16,
    chosen,
    gemm_line,
    kept_gemm,
    use_gemm,
)
from moestro.engine.planning import Blueprint, MemoryPlan
from moestro.engine.text import Tokenizer
from moestro.engine.weights import ROUTERS_NAME

log = logging.getLogger("moestro.engine")


def log_found(blueprint: Blueprint, config: EngineConfig, threads: Threads) -> None:
    spec, family = blueprint.spec, blueprint.checkpoint.config.model_type
    log.info(
        "found %s: %s, %d layers of %d experts of %s, %d per token",
        config.model_path,
        family,
        len(spec.layers),
        blueprint.experts[0].num_experts,
        human_bytes(spec.slot_bytes),
        blueprint.experts_per_token,
    )
    if blueprint.manifest is not None:
        log.info(
            "factorized from %s; expert outputs are scaled by %g",
            blueprint.manifest.source,
            blueprint.output_scale,
        )
        if not blueprint.manifest.has_router:
            log.info(
                "no router: a prompt runs all experts, and chooses %.0f %% of them for its answer",
                100 * (config.sequence_density or blueprint.manifest.sequence_density),
            )
    if (routers := blueprint.checkpoint.routers) is not None:
        log.info(
            "routers: %s%s", f"from {ROUTERS_NAME}, " if routers.has_file else "", routers.words
        )
    if (quantized := own_grid_line(config, blueprint)) is not None:
        log.info("%s", quantized)
    device = blueprint.device
    name = device.place if device.room is None else device.room.name
    log.info("%s", blueprint.topology.lane.line)
    log.info("compute: %s on %s (%s)", device.compute_dtype, name, device.why)
    log.info("threads: %d (%s)", threads.count, threads.why)
    if device.place.type == "cpu":
        _log_products()


def log_plan(config: EngineConfig, blueprint: Blueprint, plan: MemoryPlan) -> None:
    """The sums, and what smaller formats would gain."""
    for line in plan.lines():
        log.info("%s", line)
    if plan.host is not None and plan.host.warning is not None:
        log.warning("%s", plan.host.warning)
    gains = gains_of(config, blueprint)
    if gains is not None:
        log.info("%s", gains.line())


def log_whole_prompts(plan: MemoryPlan) -> None:
    log.info(
        "prompts: computed whole, up to %d tokens (--max-step-tokens): the model's class cannot go"
        " on with one",
        plan.demand.step_tokens,
    )


def warn_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """An embedding with spare rows is usual; a tokenizer with spare tokens is not."""
    if tokenizer.num_ids > vocab_size:
        log.warning(
            "the tokenizer has token ids up to %d, and the embedding %d rows: prompts with ids from"
            " %d on are refused",
            tokenizer.num_ids - 1,
            vocab_size,
            vocab_size,
        )


def _log_products() -> None:
    name = chosen()
    if name is None:
        log.warning("%s", MISSING)
    else:
        log.info("products: %s", name)


def settle_many_rows(blueprint: Blueprint, config: EngineConfig, threads: int) -> None:
    """Who multiplies many rows of int8 experts, from now on: as measured, which the log says."""
    if chosen() is None:
        return
    use_gemm(NEVER)
    if blueprint.device.place.type == "cpu" and f"int8-{TILE16}" in blueprint.codec.name:
        choice = kept_gemm(config.pack_path.with_name(GEMM_NOTE), threads)
        log.info("products: %s", gemm_line(choice))
        use_gemm(choice.least_rows)
