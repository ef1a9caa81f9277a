"""How long the choice of one token takes, its logits' way to the host included."""

import statistics
import time

import torch

from moestro.engine.step import Sampler, SamplingParams

from .bench import Bench
from .found import Found

WAYS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
    "top_k 20, top_p 0.95": SamplingParams(temperature=1.0, top_k=20, top_p=0.95, seed=1),
    "top_p 0.95": SamplingParams(temperature=1.0, top_p=0.95, seed=1),
}
SPREAD = 3.0  # deviation of the logits


def sampling(bench: Bench, found: Found) -> None:
    vocab = bench.sizes.vocab_size
    drawn = torch.randn(vocab, generator=torch.Generator().manual_seed(0)).mul_(SPREAD)
    logits = drawn.to(bench.device)
    found.facts["vocab_size"] = vocab
    times_s: dict[str, float] = {}
    for name, params in WAYS.items():
        sampler = Sampler(params)
        sampler.choose(logits.cpu())
        taken = []
        for _ in range(bench.sizes.samples):
            bench.wait()
            began_s = time.perf_counter()
            sampler.choose(logits.cpu())
            taken.append(time.perf_counter() - began_s)
        times_s[name] = statistics.median(taken)
    found.facts["token_s"] = times_s
    shown = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in times_s.items())
    found.lines.append(f"ms a token over {vocab} logits: {shown}")
