"""P11: what it costs when a prompt chooses the experts of all that follows (GRIFFIN), on the demo.

Half of each window is the prompt; the other half is fed token by token and scored. Training-free
figures, without a bar: they are what they are. And what a prompt tells of the experts that its
answer asks its router for: in a cache of half of them, those that it asked for most, or those of
the largest shares.
"""

import math
from pathlib import Path
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
from moestro.factorize.evaluate import load_model

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
    results["kept"] = kept = foretold(demo, found)
    for name, share in kept.items():
        report.show(f"  half of the experts by {name}: {share:.1%} of what the answer asks for")
    finish("p11", bench, results)


@torch.inference_mode()
def foretold(folder: Path, windows: list[list[int]]) -> dict[str, float]:
    """The share of the second halves' choices that are among half of the experts, kept by

    what the first halves chose most (`counts`), by their mean share of the activations (`shares`),
    or by the second halves themselves, which is the most that a fixed half could be.
    """
    model = load_model(folder)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.block_sparse_moe.register_forward_hook(
            lambda module, given, _: seen.append(_choices(module, given[0][0]))
        )
    found: dict[str, list[float]] = {}
    for window in windows:
        half = len(window) // 2
        seen.clear()
        model(torch.tensor([window]))
        for chosen, energies in seen:
            parts = energies * chosen
            shares = parts / parts.sum(dim=1, keepdim=True).clamp_min(1e-30)
            asked = chosen[half:].sum(dim=0)
            orders = {"counts": chosen[:half].sum(0), "shares": shares[:half].sum(0)}
            for name, order in {**orders, "the answer itself": asked}.items():
                kept = order.topk(len(order) // 2).indices
                found.setdefault(name, []).append(float(asked[kept].sum() / asked.sum()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _choices(module: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, E] ones for the chosen experts, and every expert's squared norm of activations."""
    logits = rows @ module.router.weight.T
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(module.router.top_k).indices, 1.0)
    gate, up = torch.einsum("th,eoh->teo", rows, module.experts.gate_up_proj).chunk(2, -1)
    return chosen, (torch.nn.functional.silu(gate) * up).square().sum(-1)


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
