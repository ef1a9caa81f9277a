"""What a model lets a sequence have of its own: which experts, and who chooses among them."""

import logging
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from moestro.cache import human_bytes
from moestro.engine.facts import NO_SEQUENCE_EXPERTS, EngineConfig, StartError
from moestro.engine.kernels import Router, route
from moestro.engine.lanes import LanePart, PackedLane, PassLane, last_rows
from moestro.engine.model import RouterPlace, StepPhase, ThinRouter, experts_aside
from moestro.engine.neurons import Mlp, install, mlp_of
from moestro.engine.planning import Blueprint
from moestro.engine.selection import Ranking, SequenceExperts, ranking_of

log = logging.getLogger("moestro.engine")


USUAL_DENSITY = 0.5  # that the log reckons with where none is given
PROBE = ((0, 0), (0, 0, 0))  # two sequences, so that rows of one of them are seen as such


def sequence_experts(
    config: EngineConfig, blueprint: Blueprint, lane: PassLane, step: StepPhase
) -> SequenceExperts | None:
    """None where the model cannot: a row of what its experts read is no token, or the one expert of

    a token is all that is known of the choice. The model of `lane` has its weights.

    In a factorized model all kept experts run, each with the weight that one of its chosen ones
    has; its shared expert, which was chosen to be needed always, stays whole. Elsewhere its router
    chooses, and the same density is kept of the neurons of shared experts and layers without
    experts: one number says how much of the FFN an answer is computed with. Raises StartError where
    that is asked of all requests.
    """
    model = lane.model
    if not blueprint.topology.rows_are_tokens:
        _refuse_default(config)
        return None
    counts = [entry.num_experts for entry in blueprint.experts]
    weight, rankings = None, list[Ranking | None]([None] * len(counts))
    mlps = dict[torch.nn.Module, Mlp]()
    if blueprint.manifest is not None:
        weight, how = 1 / blueprint.experts_per_token, "all that it keeps run"
    else:
        places = zip(blueprint.topology.routers, counts, strict=True)
        with torch.inference_mode():
            rankings = [_ranking(model, place, count) for place, count in places]
        if not any(rankings) and max(blueprint.topology.experts_per_token) == 1:
            _refuse_default(config)  # a choice of one cannot be cut down
            return None
        known = sum(each is not None for each in rankings)
        how = f"the routers of {known} of {len(counts)} layers choose among those that it keeps"
        how += "" if known == len(counts) else ", the others' choices are cut down to them"
        mlps = _choosable(blueprint, lane)
        install(model, mlps.items(), step)
    log.info("experts of a sequence (mode sequence): %s", how)
    least, place = config.sequence_least_tokens, blueprint.device.place
    found = SequenceExperts(counts, weight, least, place, rankings, list(mlps.values()))
    _log_neurons(config, found)
    return found


def _choosable(blueprint: Blueprint, lane: PassLane) -> dict[torch.nn.Module, Mlp]:
    """MLPs that every pass runs once on all of its rows.

    None on a device with memory of its own: its KV is taken whole, there is no room in it.
    """
    if blueprint.device.room is not None:
        return {}
    dtype, experts = blueprint.device.compute_dtype, set(blueprint.topology.experts_paths)
    with torch.inference_mode():
        found = {
            module: mlp
            for path, module in lane.model.named_modules()
            if path not in experts and (mlp := mlp_of(module, dtype)) is not None
        }
        rows = _rows_seen(lane, list(found)) if found else {}
    own = [sum(map(len, PROBE))] if lane.packs else [len(ids) for ids in PROBE]
    return {module: mlp for module, mlp in found.items() if rows[module] == own}


def _rows_seen(lane: PassLane, modules: list[torch.nn.Module]) -> dict[torch.nn.Module, list[int]]:
    """How many rows each of `modules` is given, call by call, while PROBE is computed."""
    seen = {module: list[int]() for module in modules}

    def note(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        (rows,) = (*given, *named.values())
        seen[module].append(rows.numel() // rows.shape[-1])

    handles = [each.register_forward_pre_hook(note, with_kwargs=True) for each in modules]
    own = lane.with_own_pages(len(PROBE)) if isinstance(lane, PackedLane) else lane
    parts = [LanePart((at, 0), [at], list(ids), 0) for at, ids in enumerate(PROBE)]
    try:
        with experts_aside(lane.model):
            for some in [parts] if own.packs else [[part] for part in parts]:
                own.run(some, last_rows(some))
    finally:
        for handle in handles:
            handle.remove()
        for part in parts:
            own.forget(part.key)
    return seen


def _log_neurons(config: EngineConfig, found: SequenceExperts) -> None:
    if not found.neuron_layers:
        log.info("neurons of a sequence (mode sequence): all of what all tokens run serve")
        return
    density = config.sequence_density or USUAL_DENSITY
    size_bytes = found.copies_bytes(config.sequence_least_tokens, density)
    log.info(
        "neurons of a sequence (mode sequence): %d MLPs that all tokens run are chosen from in"
        " blocks of %d, at density %g its copies take %s of the KV cache; all others stay whole",
        found.neuron_layers,
        Mlp.block,
        density,
        human_bytes(size_bytes),
    )


def _refuse_default(config: EngineConfig) -> None:
    """Raises StartError where all requests shall have what this model cannot."""
    if config.sequence_density is not None:
        raise StartError(f"--experts-mode sequence: {NO_SEQUENCE_EXPERTS}; leave it out")


def _ranking(model: PreTrainedModel, place: RouterPlace | None, count: int) -> Ranking | None:
    """None where its router cannot be asked for the order of all `count` experts."""
    if place is None or not place.reads_as_experts:
        return None
    router = model.get_submodule(place.path)
    found = ranking_of(router, place.ids_index, place.given_too(model), count)
    thin = router.__dict__.get("forward")
    if found is not None and isinstance(thin, ThinRouter):
        return partial(_route, thin.router._replace(k=count))
    return found


def _route(router: Router, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, shares, ids = route(rows.contiguous(), router)
    return ids, shares
