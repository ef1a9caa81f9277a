"""The chain that makes a plan: collect -> split -> route, layer by layer.

Minutes on one thread, not seconds.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from moestro.engine import Progress, ProgressFn
from moestro.factorize.facts import (
    Plan,
    PlanFacts,
    RouterWeights,
    SplitOptions,
    WorkFolder,
    key_of,
)
from moestro.factorize.sources import DenseModel

from .calibration import load_dense, load_tokenizer, read_windows
from .collect import layer_samples
from .sampling import sample_windows
from .stages import Stages

log = logging.getLogger("moestro.factorize")

SPLIT_WORDS = {
    "coactivation": "in equal groups by the linearly foreseeable part of their activity",
    "kmeans": "in equal groups by their gates' weights",
    "importance": "given to the kind of text that they matter most to",
    "contiguous": "in equal slices of the checkpoint's order",
    "random": "in equal groups at random",
}
ROUTER_WORDS = {
    "ridge": "ridge router on the root of each group's output norm",
    "prior": "router trained towards the experts nearest to the dense output",
    "norm": "router trained on each group's output norm",
    "moefication": "router trained on each group's share of the activation",
    "none": "no router: a prompt's shares of the activation decide (GRIFFIN)",
}


def make_plan(
    source: Path,
    options: SplitOptions,
    calibration_texts: Sequence[Path],
    progress: ProgressFn,
    command: str = "",
    work: Path | None = None,
) -> Plan:
    """Equal inputs give an equal plan on one machine; elsewhere sums may round otherwise.

    Without texts the model writes one, by the seed. `work` keeps what the dense model did, for the
    next plan from the same weights and texts and for a run after a stopped one. Raises
    SourceRefused for a model without an exact twin, FactorizeError for unfit options, texts that
    are too short, or a damaged `work`.
    """
    dense = DenseModel.open(source)
    options.expert_neurons(dense.neurons)
    options.check_layers(dense.layers)
    source_sha256 = dense.content_sha256()
    place = WorkFolder(work) if work is not None else None
    windows = _windows(source, options, calibration_texts, place, source_sha256, progress)
    texts_sha256 = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    stages = Stages(options, place, source_sha256, texts_sha256)
    fits = stages.routed_before(dense.layers)
    progress(Progress("calibrate", len(fits), dense.layers, "layers"))
    for sample in layer_samples(dense, windows, stages.collected, len(fits)):
        fits.append(stages.fit(len(fits), sample))
        del sample  # before the next layer's is made
        progress(Progress("calibrate", len(fits), dense.layers, "layers"))
    facts = PlanFacts(
        source=source.name,
        source_sha256=source_sha256,
        texts_sha256=texts_sha256,
        method=method_words(options),
        command=command,
        router_hit=round(sum(fit.hit for fit in fits) / len(fits), 4),
        options=options,
    )
    width = torch.int16 if dense.neurons <= 1 << 15 else torch.int32
    return Plan(
        torch.stack([fit.order for fit in fits]).to(width),
        RouterWeights.stack([fit.router for fit in fits]),
        facts,
        torch.tensor([fit.scale for fit in fits]),
    )


def _windows(
    source: Path,
    options: SplitOptions,
    texts: Sequence[Path],
    place: WorkFolder | None,
    source_sha256: str,
    progress: ProgressFn,
) -> torch.Tensor:
    """[N, S] ids: of the texts, or without any, of one that the model writes or has written."""
    tokenizer, tokens, window = (
        load_tokenizer(source),
        options.calibration_tokens,
        options.window_tokens,
    )
    if texts:
        return read_windows(tokenizer, texts, tokens, window)
    name = f"sampled-{key_of(source_sha256, tokens, window, options.seed)}"
    if place is not None and place.has(name):
        return place.get(name)["windows"]
    log.info(
        "no calibration text given: the dense model writes %d tokens itself, with the seed %d",
        max(1, tokens // window) * window,
        options.seed,
    )
    model = load_dense(source)
    vocabulary = min(len(tokenizer), int(model.config.vocab_size))
    windows = sample_windows(model, vocabulary, tokens, window, options.seed, progress)
    if place is not None:
        place.put(name, {"windows": windows})
    return windows


def method_words(options: SplitOptions) -> str:
    words = [
        "hottest neurons shared" if options.shared_neurons else "no neurons shared",
        f"the others {SPLIT_WORDS[options.split]}",
        ROUTER_WORDS[options.router],
    ]
    return "; ".join(words if options.scale == "one" else [*words, f"scale {options.scale}"])
