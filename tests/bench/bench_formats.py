"""What the formats cost in quality: perplexity and divergence on the demo model, all experts on.

    make bench ARGS=bench_formats

All 24 experts of every layer run, so that only the formats differ from the dense model. The text
is the interpreter's own help topics.
"""

import math
import os
from pathlib import Path
from pydoc_data import topics
from typing import Any

import report
import torch

from engine_kit import MIB, opened
from moestro.engine.facts import PAGE_TOKENS
from moestro.engine.lanes import LanePart
from moestro.engine.loader import Loaded
from moestro.factorize import prepare_demo

WINDOW_TOKENS, WINDOWS = 512, 8
FORMATS = [
    ("native", "native"),
    ("int8", "native"),
    ("native", "int8"),
    ("int8", "int8"),
    ("int4", "native"),
    ("nf4", "native"),
]


def main() -> None:
    torch.set_num_threads(1)
    cache_dir = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    demo = prepare_demo(cache_dir, lambda _: None)
    report.show(f"machine: {report.machine()}")
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    reference: list[torch.Tensor] = []
    results: dict[str, Any] = {}
    for experts, dense in FORMATS:
        settings = {"expert_format": experts, "dense_format": dense}
        with opened(
            demo, cache_dir, kv_memory_bytes=128 * MIB, experts_per_token=24, **settings
        ) as loaded:
            losses, found = [], []
            for ids in windows(loaded, text):
                scores = log_probabilities(loaded, ids)
                losses.append(-scores[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean())
                found.append(scores.half())
        reference = reference or found
        divergence = [
            (wanted.float().exp() * (wanted.float() - scores.float())).sum(1).mean()
            for wanted, scores in zip(reference, found, strict=True)
        ]
        perplexity = math.exp(float(torch.stack(losses).mean()))
        results[f"{experts}/{dense}"] = row = {
            "perplexity": perplexity,
            "ratio": perplexity / results["native/native"]["perplexity"] if results else 1.0,
            "mean_kl": float(torch.stack(divergence).mean()),
        }
        report.show(
            f"experts {experts:>6}, dense {dense:>6}: perplexity {perplexity:.3f}"
            f" ({row['ratio']:.4f} x native), mean KL {row['mean_kl']:.5f}"
        )
    report.finish("formats", results)


def windows(loaded: Loaded, text: str, count: int = WINDOWS) -> list[list[int]]:
    ids = loaded.tokenizer.encode(text[: WINDOW_TOKENS * count * 12])
    return [ids[i * WINDOW_TOKENS : (i + 1) * WINDOW_TOKENS] for i in range(count)]


def log_probabilities(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """[n, V] of one window, alone."""
    return packed_logits(loaded, ids).log_softmax(-1)


def packed_logits(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """[n, V] of one window, alone, before any softmax."""
    lane = loaded.engine.runner.lane
    with torch.inference_mode():
        logits = lane.run(
            [LanePart((0, 0), range(-(-len(ids) // PAGE_TOKENS)), ids, 0)], range(len(ids))
        )
    lane.forget((0, 0))
    return logits


if __name__ == "__main__":
    main()
