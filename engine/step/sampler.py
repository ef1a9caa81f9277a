"""Logits to a token id: greedy, temperature, top-k, top-p; one seeded generator per sequence."""

import secrets

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .sequence import SamplingParams

COLDEST = 1e-5  # below, only the largest logit has a chance: greedy


class NonFiniteLogits(Exception):
    """The model gave NaN or infinity; this sequence cannot go on."""


class Sampler:
    """Chooses the tokens of one sequence. The same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        self._greedy = params.temperature < COLDEST
        self._warpers = LogitsProcessorList()
        if self._greedy:
            return
        self._generator = torch.Generator()
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        self._generator.manual_seed(seed % 2**63)
        if params.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            self._warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(params.top_p))

    def choose(self, logits: torch.Tensor) -> int:
        """`logits` [V], fp32. Raises NonFiniteLogits."""
        best = int(logits.argmax())
        if not bool(torch.isfinite(logits[best])):
            raise NonFiniteLogits("the model's logits are not finite")
        if self._greedy:
            return best
        # from the maximum down: dividing by a small temperature cannot overflow
        scores = self._warpers(torch.empty((1, 0), dtype=torch.long), (logits - logits[best])[None])  # type: ignore[arg-type]
        probabilities = scores[0].softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
