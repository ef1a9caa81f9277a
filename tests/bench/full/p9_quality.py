"""P9: what the codecs cost in quality, on the demo model with all its experts active.

With all of them on, the factorized model computes what the dense one does, so that nothing but
the formats differs.
"""

import math
from pydoc_data import topics
from typing import Any

import report
import torch
from bench_formats import WINDOW_TOKENS, WINDOWS, log_probabilities, windows

from engine_kit import MIB, opened
from moestro.engine import StartError
from moestro.factorize import prepare_demo

from .bars import Bar
from .bench import Bench, begin, finish

BARS = {"int8": 1.01, "int4": 1.06}
FORMATS = (  # experts, dense
    ("native", "native"),
    ("int8", "native"),
    ("int8", "int8"),
    ("int4", "native"),
    ("int4", "int8"),
    ("int4", "int4"),
)
ALL_EXPERTS = 24


def run(bench: Bench) -> None:
    begin(f"P9 quality: demo model, all experts, {WINDOWS} windows of {WINDOW_TOKENS} tokens")
    torch.set_num_threads(1)
    demo = prepare_demo(bench.demo_cache, lambda _: None)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    results: dict[str, Any] = {}
    reference: list[torch.Tensor] = []
    for experts, dense in FORMATS:
        name = f"{experts}/{dense}"
        settings: dict[str, Any] = {"expert_format": experts, "dense_format": dense}
        settings |= {"experts_per_token": ALL_EXPERTS}
        try:
            with opened(demo, bench.demo_cache, kv_memory_bytes=128 * MIB, **settings) as loaded:
                ids = windows(loaded, text)
                scores = [log_probabilities(loaded, each) for each in ids]
        except StartError as error:
            bench.without(f"P9 {name}", error)
            continue
        reference = reference or scores
        results[name] = row = compare(reference, scores, ids)
        report.show(f"  {name}: perplexity {row['perplexity']:.3f}, mean KL {row['mean_kl']:.5f}")
        if experts in BARS:
            ratio = row["perplexity"] / results["native/native"]["perplexity"]
            bar = Bar(f"P9 perplexity {name}", ratio, BARS[experts], "x native", at_most=True)
            bench.hold(bar)
    finish("p9", bench, results)


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
