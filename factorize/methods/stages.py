"""split -> route of one layer, each kept in the work folder under what it depends on.

So a stopped run goes on at the layer where it stopped, and another router takes the split as it is.
Letters: I neurons, E experts, M neurons of one, H hidden size.
"""

from dataclasses import dataclass, replace

import torch

from moestro.factorize.facts import (
    RouterWeights,
    SplitOptions,
    WorkFolder,
    expert_groups,
    key_of,
    with_none,
)

from .calibration import LayerSample
from .routing import Activity, fit_ridge, hit_rate, observe
from .scale import best_scale, fixed_scale
from .split import split_neurons
from .trained_router import activation_of, nearest_experts, train_router


@dataclass(frozen=True, slots=True)
class LayerFit:
    order: torch.Tensor  # [I], the shared neurons first
    router: RouterWeights
    scale: float
    hit: float  # on the calibration tokens themselves


class Stages:
    """Of one plan. `place` None: nothing is kept."""

    def __init__(
        self, options: SplitOptions, place: WorkFolder | None, source_sha256: str, texts_sha256: str
    ) -> None:
        self._options = options
        # sums round otherwise with another number of threads
        observed = (source_sha256, texts_sha256, torch.get_num_threads())
        o = options
        split = (*observed, o.split, o.experts, o.shared_neurons, o.seed)
        form = (o.router_steps, o.router_hidden, o.router_bias, *(["norms"] if o.tau < 1 else []))
        layers = [o.layer_top_k] if o.layer_top_k else []
        route = (*split, o.top_k, o.router, o.scale, o.ridge, *form, *layers)
        self.collected = place.inside(f"collect-{key_of(*observed)}") if place else None
        self._split = place.inside(f"split-{key_of(*split)}") if place else None
        self._routed = place.inside(f"route-{key_of(*route)}") if place else None

    def routed_before(self, layers: int) -> list[LayerFit]:
        """Of the first layers, those that an earlier run has finished. Raises FactorizeError."""
        found: list[LayerFit] = []
        while self._routed and len(found) < layers and self._routed.has(_name(len(found))):
            kept = self._routed.get(_name(len(found)))
            parts = {name: kept[name] for name in ("last", "first", "bias") if name in kept}
            router = RouterWeights(**parts, activation=activation_of(self._options))
            found.append(LayerFit(kept["order"], router, float(kept["scale"]), float(kept["hit"])))
        return found

    @torch.no_grad()
    def fit(self, layer: int, sample: LayerSample) -> LayerFit:
        """Raises FactorizeError when the work folder is damaged or full."""
        order = self._order(layer, sample)
        groups = expert_groups(order, self._options)
        whole = _with_none(sample) if self._options.has_empty_places(len(order)) else sample
        own = self._options
        if own.layers:
            own = replace(own, top_k=own.layers[layer], layer_top_k="")
        fit = LayerFit(order, *route(whole, groups, own))
        if self._routed is not None:
            numbers = {"scale": fit.scale, "hit": fit.hit}
            exact = {n: torch.tensor(value, dtype=torch.float64) for n, value in numbers.items()}
            self._routed.put(_name(layer), {"order": order} | fit.router.tensors() | exact)
        return fit

    def _order(self, layer: int, sample: LayerSample) -> torch.Tensor:
        if self._split is not None and self._split.has(_name(layer)):
            return self._split.get(_name(layer))["order"]
        o = self._options
        shared, groups = split_neurons(o.split, sample, o.shared_neurons, o.experts, o.seed)
        order = torch.cat([shared, *groups])
        if self._split is not None:
            self._split.put(_name(layer), {"order": order})
        return order


def _with_none(sample: LayerSample) -> LayerSample:
    """With a neuron behind that never does anything, for the empty places of experts."""
    return replace(
        sample,
        neurons=with_none(sample.neurons, dim=1),
        down=with_none(sample.down, dim=1),
        gate=with_none(sample.gate),
    )


def route(
    sample: LayerSample, groups: torch.Tensor, options: SplitOptions
) -> tuple[RouterWeights, float, float]:
    """(router, scale, hit rate) of the experts `groups` [E, M]."""
    if options.router == "none":
        return RouterWeights(torch.zeros(len(groups), sample.inputs.shape[1]).half()), 1.0, 0.0
    activity = observe(sample, groups)
    scale = fixed_scale(options.scale, options.experts, options.top_k)
    router = _fit_router(sample, groups, activity, options, scale)
    logits = router.logits(sample.inputs)
    hit = hit_rate(logits, activity.norms, options.top_k)
    if options.scale == "calibrated":
        chosen = logits.topk(options.top_k, dim=1).indices
        scale = best_scale(sample, groups, activity, chosen)
    return router, scale, hit


def _fit_router(
    sample: LayerSample,
    groups: torch.Tensor,
    activity: Activity,
    options: SplitOptions,
    scale: float,
) -> RouterWeights:
    if options.router == "ridge":
        return fit_ridge(activity, options.ridge)
    if options.scale == "calibrated":
        # the best one for the experts nearest to the output: the router's labels depend on it, and
        # its own choice is not known yet
        scale = best_scale(sample, groups, activity, nearest_experts(activity, options.top_k, 1.0))
    return train_router(activity, options, scale)


def _name(layer: int) -> str:
    return f"layer-{layer:04}"
