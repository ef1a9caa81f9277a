"""P11: what it costs when a prompt chooses the experts of all that follows (GRIFFIN), on the demo.

Half of each window is the prompt; the other half is fed token by token and scored. Training-free
figures, without a bar: they are what they are.
"""

import math
from pydoc_data import topics
from typing import Any

import report
import torch
from bench_formats import WINDOW_TOKENS, windows

from engine_kit import MIB, opened
from moestro.engine import SamplingParams
from moestro.engine.facts import PAGE_TOKENS
from moestro.engine.loader import Loaded
from moestro.engine.step.sequence import Batch, Part, Sequence
from moestro.factorize import prepare_demo

from .bench import Bench, begin, finish

WINDOWS = 4
DENSITIES = (None, 0.75, 0.5, 0.25)  # None: the router, token by token


def run(bench: Bench) -> None:
    begin(f"P11 experts chosen by the prompt: {WINDOWS} windows, half of {WINDOW_TOKENS} tokens")
    torch.set_num_threads(1)
    demo = prepare_demo(bench.demo_cache, lambda _: None)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    results: dict[str, Any] = {}
    with opened(demo, bench.shop.path("cache-p11"), kv_memory_bytes=128 * MIB) as loaded:
        found = windows(loaded, text, WINDOWS)
        for density in DENSITIES:
            losses = [score(loaded, window, density) for window in found]
            name = "token" if density is None else f"sequence {density:g}"
            results[name] = perplexity = math.exp(sum(losses) / len(losses))
            report.show(
                f"  {name}: perplexity {perplexity:.3f}"
                f" ({perplexity / results['token']:.3f} x token by token)"
            )
    finish("p11", bench, results)


def score(loaded: Loaded, window: list[int], density: float | None) -> float:
    """Mean loss of the second half of `window`, one token a step."""
    half = len(window) // 2
    engine = loaded.engine
    params = SamplingParams(max_tokens=len(window), expert_density=density)
    sequence = Sequence(0, window[:half], params)
    sequence.pages = engine.scheduler.pool.take(-(-len(window) // PAGE_TOKENS) + 1)
    loss, logits = 0.0, engine.runner.run(Batch((Part(sequence, half),))).logits
    for token in window[half:]:
        loss -= float(logits[-1].log_softmax(-1)[token])
        sequence.token_ids.append(token)
        logits = engine.runner.run(Batch((Part(sequence, 1),))).logits
    engine.runner.forget(sequence)
    engine.scheduler.pool.release(sequence.pages)
    return loss / (len(window) - half)
