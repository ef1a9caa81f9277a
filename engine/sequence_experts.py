"""What a model lets a sequence have of its own: which experts, and who chooses among them."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from moestro.engine.facts import NO_SEQUENCE_EXPERTS, EngineConfig, StartError
from moestro.engine.kernels import Router, route
from moestro.engine.lanes import PassLane
from moestro.engine.model import RouterPlace, StepPhase, ThinRouter
from moestro.engine.neurons import Mlp, install
from moestro.engine.planning import Blueprint, trim_heap
from moestro.engine.selection import Ranking, SequenceExperts, ranking_of

from .sequence_neurons import choosable_mlps, log_neurons

log = logging.getLogger("moestro.engine")


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
    weights, rankings = None, list[Ranking | None]([None] * len(counts))
    mlps = dict[torch.nn.Module, Mlp]()
    if blueprint.manifest is not None:
        weights, how = _kept_weights(blueprint), "all that it keeps run"
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
        mlps = choosable_mlps(blueprint, lane)
        install(model, mlps.items(), step)
    log.info("experts of a sequence (mode sequence): %s", how)
    least, place = config.sequence_least_tokens, blueprint.device.place
    neurons = list(mlps.values())
    found = SequenceExperts(
        counts, weights, least, place, rankings, neurons, trim_heap, _density_of(blueprint)
    )
    log_neurons(config, found)
    return found


def _kept_weights(blueprint: Blueprint) -> tuple[float, ...]:
    """What an expert of each layer weighs, of a factorized model."""
    asked, routers = blueprint.experts_per_token, blueprint.checkpoint.routers
    if routers is None:
        return (1 / asked,) * len(blueprint.experts)
    return tuple(routers.weight_of(layer, asked) for layer in range(len(blueprint.experts)))


def _density_of(blueprint: Blueprint) -> Callable[[int, float], float]:
    """What a layer keeps of its experts where a sequence keeps a density of all."""
    routers, experts = blueprint.checkpoint.routers, blueprint.experts

    def density_of(layer: int, density: float) -> float:
        if routers is None:
            return density
        return routers.density_of(layer, density, experts[layer].num_experts)

    return density_of


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
