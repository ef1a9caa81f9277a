"""`--expert-format auto`: one of the formats by name, settled before anything hangs on it.

On a device with memory of its own the finest of `native` and `int8` whose experts all have a slot
there, else `nf4`, of which the most have one; where the host computes, `native`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moestro.cache import DoesNotFit, plan_slots
from moestro.engine.facts import BudgetTooSmall, Device, EngineConfig, StartError
from moestro.engine.formats import AUTO, Codec, expert_codec
from moestro.engine.planning import Blueprint, HostMemory, plan_memory, understand
from moestro.engine.weights import Checkpoint

from .card import FormatShare

FINEST_FIRST = ("native", "int8", "nf4")  # what a GPU computes with, the smallest last
# `make bench ARGS=bench_formats`: the demo with all experts on, dense weights as they are.
PRICES = {
    "native": "costs no perplexity",
    "int8": "costs the demo no perplexity that could be measured",
    "nf4": "costs the demo 1.6 % perplexity",
}
ON_THE_CPU = (
    f"expert format: native ({AUTO}): the CPU computes, for which smaller formats are chosen by"
    f" name (int8, int4); native {PRICES['native']}"
)


@dataclass(frozen=True, slots=True)
class Understood:
    """A model, and the config with its experts' format settled."""

    config: EngineConfig
    blueprint: Blueprint
    shares: tuple[FormatShare, ...] = ()  # those that were looked at, the finest first
    reason: str | None = None  # a line for people, where the format was to be chosen


def understand_settled(
    config: EngineConfig,
    checkpoint: Checkpoint,
    device: Device,
    machine: HostMemory | None = None,
) -> Understood:
    """`understand`, with `auto` settled first; `machine`: as of `plan_memory`.

    Raises StartError as `understand` does.
    """
    if config.expert_format != AUTO:
        return Understood(config, understand(config, checkpoint, device))
    native = replace(config, expert_format="native")
    blueprint = understand(native, checkpoint, device)
    if device.room is None:
        return Understood(native, blueprint, reason=ON_THE_CPU)
    shares: list[FormatShare] = []
    for name in FINEST_FIRST:
        shares.append(share_of(replace(config, expert_format=name), blueprint, machine))
        if shares[-1].share == 1:
            break
    chosen = chosen_of(shares)
    settled = replace(config, expert_format=chosen.expert_format)
    codec = _codec(settled, blueprint)
    return Understood(
        settled, replace(blueprint, codec=codec), tuple(shares), reason_of(chosen, shares)
    )


def share_of(
    config: EngineConfig, blueprint: Blueprint, machine: HostMemory | None = None
) -> FormatShare:
    """Of the experts in the device's slots, were they in the format that `config` names."""
    name = config.expert_format
    try:
        other = replace(blueprint, codec=_codec(config, blueprint))
        spec = other.spec
    except StartError as error:
        return FormatShare(name, None, str(error), refused=True)
    try:
        plan = plan_memory(config, other, packing=not config.pack_path.exists(), machine=machine)
        slots = plan_slots(plan.experts_bytes, spec, max(blueprint.topology.experts_per_token))
    except (BudgetTooSmall, DoesNotFit) as error:
        return FormatShare(name, None, str(error))
    except StartError as error:
        return FormatShare(name, None, str(error), refused=True)
    return FormatShare(name, slots.slots / spec.num_experts)


def chosen_of(shares: Sequence[FormatShare]) -> FormatShare:
    """Of formats, the finest first: the first that fits whole, else the smallest that fits at all,

    else the smallest that could be, whose plan says what is missing.
    """
    whole = next((one for one in shares if one.share == 1), None)
    if whole is not None:
        return whole
    smallest_first = shares[::-1]
    fitting = next((one for one in smallest_first if one.share is not None), None)
    possible = next((one for one in smallest_first if not one.refused), shares[0])
    return fitting or possible


def reason_of(chosen: FormatShare, shares: Sequence[FormatShare]) -> str:
    """The choice, its share beside those of the others, and its price."""
    others = [one for one in shares if one is not chosen]
    known = [f"{one.expert_format} {_percent(one)}" for one in others if not one.refused]
    parts = [", ".join([f"{_percent(chosen)} of the experts fit the card's slots", *known])]
    parts += [f"no {one.expert_format} ({one.why})" for one in others if one.refused]
    parts.append(f"{chosen.expert_format} {PRICES[chosen.expert_format]}")
    return f"expert format: {chosen.expert_format} ({AUTO}): {'; '.join(parts)}"


def _percent(one: FormatShare) -> str:
    """Only all are 100 %."""
    if one.share is None:
        return "none"
    return f"{100 if one.share == 1 else min(99, round(100 * one.share))} %"


def _codec(config: EngineConfig, blueprint: Blueprint) -> Codec:
    device = blueprint.device
    return expert_codec(
        config.expert_format, blueprint.experts, device.compute_dtype, device.place.type
    )
