"""What would change a plan, and the nearest one that fits. Pure arithmetic; no tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from moestro.cache import human_bytes
from moestro.engine.facts import GIB, MIB, BudgetTooSmall, EngineConfig, round_up_tokens
from moestro.engine.planning import Demand, MemoryPlan

from .forecast import Forecast

KIB = 1024

Budgets = tuple[int | None, int | None, int | None]  # host memory, kv memory, longest sequence


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to try; `flags` is empty where no flag helps."""

    flags: str
    effect: str


def size_flag(count_bytes: int) -> str:
    """A size as a flag takes it, exact."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count_bytes and count_bytes % unit == 0:
            return f"{count_bytes // unit}{name}"
    return str(count_bytes)


def round_up_mib(count_bytes: int) -> int:
    return -(-count_bytes // MIB) * MIB


def changes(forecast: Forecast) -> list[Change]:
    """What the user could do about memory and speed, most useful first."""
    found = []
    if not forecast.holds_all:
        found.append(_all_resident(forecast))
        found += _fewer_experts(forecast)
    found += _whole_context(forecast)
    return found


def _all_resident(forecast: Forecast) -> Change:
    plan, demand = forecast.plan, forecast.plan.demand
    best = forecast.decode_with_all
    needed = round_up_mib(demand.experts_total_bytes)
    room = plan.limit_bytes - demand.fixed_bytes - plan.kv_bytes
    gain = f"decode at most {best.tokens_per_s:.3g} tokens/s, limited by {best.limit}"
    if needed <= room:
        return Change(f"--host-memory {size_flag(needed)}", f"all experts are resident: {gain}")
    return Change(
        "",
        f"all experts resident would take {human_bytes(demand.experts_total_bytes)};"
        f" {plan.limit_name} leaves {human_bytes(max(0, room))} for them ({gain})",
    )


def _fewer_experts(forecast: Forecast) -> list[Change]:
    usual = round(forecast.work.mean_experts_per_token)  # layers may differ, and change alike
    if not forecast.factorized or usual < 2 or forecast.decode.low.limit != "disk":
        return []
    effect = "half of the bytes per token, and worse answers (`moestro evaluate` says how much)"
    return [Change(f"--experts-per-token {usual // 2}", effect)]


def _whole_context(forecast: Forecast) -> list[Change]:
    plan, demand = forecast.plan, forecast.plan.demand
    needed = round_up_mib(round_up_tokens(demand.context_tokens) * demand.kv_bytes_per_token)
    room = plan.limit_bytes - demand.fixed_bytes - plan.experts_bytes
    if plan.kv_tokens >= demand.context_tokens or needed > room:
        return []
    effect = f"sequences of {demand.context_tokens} tokens instead of {plan.kv_tokens}"
    return [Change(f"--kv-memory {size_flag(needed)}", effect)]


def nearest_plan(
    config: EngineConfig, plan: Callable[[EngineConfig], MemoryPlan]
) -> EngineConfig | None:
    """The same settings with as few as possible of the given budgets changed, so that they fit.

    Where no budgets would fit, a given size of steps goes too. Changed ones are explicit in what is
    returned. None where nothing would fit.
    """
    found = _nearest_budgets(config, plan)
    if found is not None or config.max_step_tokens is None:
        return found
    found = _nearest_budgets(replace(config, max_step_tokens=None), plan)
    if found is None:
        return None
    return replace(found, max_step_tokens=plan(found).demand.step_tokens)


def _nearest_budgets(
    config: EngineConfig, plan: Callable[[EngineConfig], MemoryPlan]
) -> EngineConfig | None:
    """With as few as possible of the given budgets changed; None where none would fit."""
    try:
        free = plan(
            replace(config, host_memory_bytes=None, kv_memory_bytes=None, max_model_len_tokens=None)
        )
    except BudgetTooSmall:
        return None
    given = (config.host_memory_bytes, config.kv_memory_bytes, config.max_model_len_tokens)
    for host, kv, context in _options(given, free.demand):
        tried = replace(
            config,
            host_memory_bytes=host,
            kv_memory_bytes=kv,
            max_model_len_tokens=context,
        )
        try:
            return _explicit(config, tried, plan(tried))
        except BudgetTooSmall:
            continue
    return None


def _options(given: Budgets, demand: Demand) -> list[Budgets]:
    """What to try for the three budgets, nearest first; None leaves one to the planner."""
    host, kv, context = given
    hosts = [host] if host is None else [host, max(host, demand.experts_least_bytes), None]
    contexts = (
        [context] if context is None else [context, min(context, demand.context_tokens), None]
    )

    def distance(option: Budgets) -> tuple[bool, int, int]:
        pairs = list(zip(given, option, strict=True))
        changed = sum(before != after for before, after in pairs)
        left = sum(before != after and after is None for before, after in pairs)
        return context is not None and option[2] is None, changed, left

    return sorted(product(hosts, [kv] if kv is None else [kv, None], contexts), key=distance)


def _explicit(config: EngineConfig, tried: EngineConfig, plan: MemoryPlan) -> EngineConfig:
    """Every budget that `config` names, as a number that `plan` took; whole MiB where it chose."""
    chosen = round_up_mib(plan.experts_bytes)
    if plan.total_bytes - plan.experts_bytes + chosen > plan.limit_bytes:
        chosen = max(plan.demand.experts_least_bytes, chosen - MIB)
    context = min(plan.demand.context_tokens, plan.kv_tokens)
    return replace(
        config,
        host_memory_bytes=config.host_memory_bytes and (tried.host_memory_bytes or chosen),
        kv_memory_bytes=config.kv_memory_bytes and plan.kv_bytes,
        max_model_len_tokens=config.max_model_len_tokens
        and (tried.max_model_len_tokens or context),
    )


def flags_of(config: EngineConfig) -> str:
    """The budgets of `config` as flags."""
    flags = []
    if config.host_memory_bytes is not None:
        flags.append(f"--host-memory {size_flag(config.host_memory_bytes)}")
    if config.kv_memory_bytes is not None:
        flags.append(f"--kv-memory {size_flag(config.kv_memory_bytes)}")
    if config.max_model_len_tokens is not None:
        flags.append(f"--max-model-len {config.max_model_len_tokens}")
    if config.max_step_tokens is not None:
        flags.append(f"--max-step-tokens {config.max_step_tokens}")
    return " ".join(flags)
