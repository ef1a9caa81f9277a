"""Makes a plan out of a dense model and calibration texts. Minutes on one thread, not seconds."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from moestro.engine import Progress, ProgressFn
from moestro.factorize.facts import Plan, PlanFacts, SplitOptions
from moestro.factorize.sources import DenseModel

from .calibration import LayerSample, layer_samples, load_dense, load_tokenizer, read_windows
from .routing import expert_norms, fit_router, hit_rate
from .split import split_neurons

METHOD = (
    "hottest neurons shared; the others in equal groups by the linearly foreseeable part of their "
    "activity; ridge router on the root of each group's output norm"
)


def make_plan(
    source: Path,
    options: SplitOptions,
    calibration_texts: Sequence[Path],
    progress: ProgressFn,
    command: str = "",
) -> Plan:
    """Equal inputs give an equal plan on one machine; elsewhere sums may round otherwise.

    Raises SourceRefused for a model without an exact twin, FactorizeError for unfit options or
    texts that are too short.
    """
    dense = DenseModel.open(source)
    options.expert_neurons(dense.neurons)
    windows = read_windows(
        load_tokenizer(source),
        calibration_texts,
        options.calibration_tokens,
        options.window_tokens,
    )
    progress(Progress("calibrate", 0, dense.layers, "layers"))
    orders, routers, hits = [], [], []
    for sample in layer_samples(load_dense(source), windows):
        order, router, hit = _fit_layer(sample, options)
        orders.append(order)
        routers.append(router)
        hits.append(hit)
        progress(Progress("calibrate", len(orders), dense.layers, "layers"))
    width = torch.int16 if dense.neurons <= 1 << 15 else torch.int32
    facts = PlanFacts(
        source=source.name,
        source_sha256=dense.content_sha256(),
        texts_sha256=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        method=METHOD,
        command=command,
        router_hit=round(sum(hits) / len(hits), 4),
        options=options,
    )
    return Plan(torch.stack(orders).to(width), torch.stack(routers), facts)


@torch.no_grad()
def _fit_layer(
    sample: LayerSample, options: SplitOptions
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(order [I], router [E, H], hit rate on the calibration tokens themselves)."""
    shared, groups = split_neurons(sample, options.shared_neurons, options.experts, options.seed)
    norms = expert_norms(sample.neurons, sample.down, groups)
    router = fit_router(sample.inputs, norms, options.ridge)
    hit = hit_rate(sample.inputs, norms, router, options.top_k)
    return torch.cat([shared, groups.flatten()]), router, hit
