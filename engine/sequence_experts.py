"""What a model lets a sequence have of its own: which experts, and who chooses among them."""

import logging
from functools import partial

import torch
from transformers import PreTrainedModel

from moestro.engine.facts import EngineConfig, StartError
from moestro.engine.kernels import Router, route
from moestro.engine.model import RouterPlace, ThinRouter
from moestro.engine.planning import Blueprint
from moestro.engine.selection import Ranking, SequenceExperts, ranking_of

log = logging.getLogger("moestro.engine")


def sequence_experts(
    config: EngineConfig, blueprint: Blueprint, model: PreTrainedModel
) -> SequenceExperts | None:
    """None where a row of what experts read is no token; `model` has its weights and lane.

    In a factorized model all kept experts run, each with the weight that one of its chosen ones
    has; elsewhere its router chooses. Raises StartError where that is asked of all requests.
    """
    if not blueprint.topology.rows_are_tokens:
        if config.sequence_density is not None:
            raise StartError(
                "--experts-mode sequence: this model's experts do not read one row a token, so a"
                " sequence cannot have a set of its own; leave it out"
            )
        return None
    counts = [entry.num_experts for entry in blueprint.experts]
    weight, rankings = None, list[Ranking | None]([None] * len(counts))
    if blueprint.manifest is not None:
        weight, how = 1 / blueprint.experts_per_token, "all that it keeps run"
    else:
        places = zip(blueprint.topology.routers, counts, strict=True)
        with torch.inference_mode():
            rankings = [_ranking(model, place, count) for place, count in places]
        known = sum(each is not None for each in rankings)
        how = f"the routers of {known} of {len(counts)} layers choose among those that it keeps"
        how += "" if known == len(counts) else ", the others' choices are cut down to them"
    log.info("experts of a sequence (mode sequence): %s", how)
    least, place = config.sequence_least_tokens, blueprint.device.place
    return SequenceExperts(counts, weight, least, place, rankings)


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
