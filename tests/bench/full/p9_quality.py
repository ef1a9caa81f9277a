"""P9: what the codecs cost in quality, on the demo's plan with all experts active.

Without the deltas of its recovery and with all experts on, the factorized model computes what the
dense one does, so that nothing but the formats differs. Measured on the demo moved off the 4-bit
grid of the file it comes from.

As a tool for tuning a format, in a minute: scripts/bench_full.sh p9 --windows 2 --formats int4/int8
"""

import math
from pathlib import Path
from pydoc_data import topics
from typing import Any

import report
import torch
from bench_formats import WINDOW_TOKENS, log_probabilities, packed_logits, windows

from engine_kit import MIB, opened
from moestro.engine import StartError
from moestro.factorize import apply_plan, demo_plan, prepare_dense

from .bars import Bar
from .bench import Bench, begin, finish
from .off_grid import make_off_grid
from .quality import NATIVE

BARS = {"int8/int8": 1.01, "int4/int8": 1.02}  # experts/dense
ALL_EXPERTS = 24
SAME_LOGITS = 1e-4
COMPARED_TOKENS = 32


class NotTheSame(Exception):
    """The moved model computes something else: nothing measured on it would mean anything."""


def run(bench: Bench) -> None:
    wanted = bench.quality
    begin(
        f"P9 quality: demo off its grid, all experts, {wanted.windows} windows of"
        f" {WINDOW_TOKENS} tokens"
    )
    torch.set_num_threads(1)
    demo = bench.shop.path("demo-exact")
    dense = prepare_dense(bench.demo_cache, lambda _: None)
    apply_plan(demo_plan(), dense, demo, lambda _: None)
    place = bench.shop.path("demo-off-grid-norms" if wanted.norms else "demo-off-grid")
    moved = make_off_grid(demo, place, norms=wanted.norms)
    cache = bench.shop.path("cache-p9")
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    apart = greatest_difference(demo, moved, cache, text)
    report.show(f"  logits of the moved model differ by {apart:.2g} (at most {SAME_LOGITS:g})")
    if apart > SAME_LOGITS:
        raise NotTheSame(f"{moved} and {demo} differ by {apart:.3g} in their logits")
    results: dict[str, Any] = {"logits_apart": apart}
    measure(bench, moved, cache, text, results)
    finish("p9", bench, results)


def greatest_difference(demo: Path, moved: Path, cache: Path, text: str) -> float:
    """Between the logits of both over the first tokens of `text`."""
    found = []
    for folder in (demo, moved):
        with opened(folder, cache, **settings(NATIVE)) as loaded:
            ids = windows(loaded, text, 1)[0][:COMPARED_TOKENS]
            found.append(packed_logits(loaded, ids))
    return float((found[0] - found[1]).abs().max())


def measure(bench: Bench, model: Path, cache: Path, text: str, results: dict[str, Any]) -> None:
    """Fills `results`, one row per format, and holds the bars of those that have one."""
    reference: list[torch.Tensor] = []
    for name in bench.quality.formats:
        try:
            with opened(model, cache, **settings(name)) as loaded:
                ids = windows(loaded, text, bench.quality.windows)
                scores = [log_probabilities(loaded, each) for each in ids]
        except StartError as error:
            bench.without(f"P9 {name}", error)
            continue
        reference = reference or scores
        results[name] = row = compare(reference, scores, ids)
        row["ratio"] = row["perplexity"] / results[NATIVE]["perplexity"]
        report.show(
            f"  {name}: perplexity {row['perplexity']:.3f} ({row['ratio']:.4f} x native),"
            f" mean KL {row['mean_kl']:.5f}"
        )
        if name in BARS:
            what = f"P9 perplexity {name}"
            bench.hold(Bar(what, row["ratio"], BARS[name], "x native", at_most=True))


def settings(name: str) -> dict[str, Any]:
    """EngineConfig's fields for a pair of formats, written `experts/dense`."""
    experts, _, dense = name.partition("/")
    return {
        "expert_format": experts,
        "dense_format": dense,
        "experts_per_token": ALL_EXPERTS,
        "kv_memory_bytes": 128 * MIB,
    }


def compare(
    reference: list[torch.Tensor], scores: list[torch.Tensor], ids: list[list[int]]
) -> dict[str, float]:
    """Perplexity over the windows, and the mean divergence from the reference, per token."""
    losses = [
        -found[:-1].gather(1, torch.tensor(window[1:])[:, None]).mean()
        for found, window in zip(scores, ids, strict=True)
    ]
    divergence = [
        (wanted.exp() * (wanted - found)).sum(1).mean()
        for wanted, found in zip(reference, scores, strict=True)
    ]
    return {
        "perplexity": math.exp(float(torch.stack(losses).mean())),
        "mean_kl": float(torch.stack(divergence).mean()),
    }
