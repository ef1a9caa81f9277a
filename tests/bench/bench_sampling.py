"""One choice of a token among 152,000, beside transformers' processors and torch's multinomial.

    make bench ARGS=bench_sampling

Ceiling: one read of the logits, 0.6 MB, at the memory's speed.
"""

import numpy as np
import report
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moestro.engine import SamplingParams
from moestro.engine.step.sampler import Sampler

VOCAB_SIZE = 151_936
BAR = 0.15
REPEATS = 31
SETTINGS = {
    "temperature 1": SamplingParams(seed=1),
    "temperature 0.7, top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95, seed=1),
    "top_k 20, top_p 0.8": SamplingParams(temperature=0.7, top_k=20, top_p=0.8, seed=1),
}


def shapes() -> dict[str, torch.Tensor]:
    """A flat distribution, one as a language model has it, and one in between."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(VOCAB_SIZE, generator=generator)
    peaked = 3 * noise
    peaked[:50] += 10 + 3 * torch.randn(50, generator=generator)
    return {"flat": noise, "between": 2 * noise, "peaked": peaked}


class Stock:
    """What this file's processors do without sorting, done with it."""

    def __init__(self, params: SamplingParams) -> None:
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warpers.append(TopPLogitsWarper(params.top_p))
        self._generator = torch.Generator().manual_seed(1)

    def choose(self, logits: torch.Tensor) -> int:
        scores = self._warpers(torch.empty((1, 0), dtype=torch.long), logits[None])  # type: ignore[arg-type]
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))


def main() -> None:
    torch.set_num_threads(1)  # a barrier between threads costs more than the work
    report.show(f"machine: {report.machine()}")
    ratios = {}
    with torch.inference_mode():
        for shape, logits in shapes().items():
            for name, params in SETTINGS.items():
                ours, stock = Sampler(params), Stock(params)
                own_s = report.seconds(lambda: ours.choose(logits), REPEATS)  # noqa: B023
                stock_s = report.seconds(lambda: stock.choose(logits), REPEATS)  # noqa: B023
                ratios[f"{shape}, {name}"] = own_s / stock_s
                report.show(
                    f"{shape:8s} {name:28s} {1e3 * own_s:6.2f} ms, stock {1e3 * stock_s:6.2f} ms:"
                    f" {own_s / stock_s:.3f} (bar {BAR})"
                )
    floor_s = report.seconds(lambda: np.zeros(VOCAB_SIZE, np.float32).max(), REPEATS)
    report.show(f"one read of as many numbers: {1e3 * floor_s:.2f} ms")
    report.finish("sampling", {"ratios": ratios, "bar": BAR, "met": max(ratios.values()) <= BAR})


if __name__ == "__main__":
    main()
