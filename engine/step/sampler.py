"""Logits to a token id; one seeded stream of random numbers per sequence."""

import secrets

import numpy as np
import torch

from .adjust import Adjustments
from .params import SamplingParams
from .truncation import Floats, Truncation, draw, truncated

COLDEST = 1e-5  # below, only the largest logit has a chance: greedy


class NonFiniteLogits(Exception):
    """The model gave NaN or infinity, or nothing may be chosen; this sequence cannot go on."""


class Sampler:
    """Chooses the tokens of one sequence. The same seed and logits give the same tokens."""

    def __init__(
        self, params: SamplingParams, adjustments: Adjustments | None = None, index: int = 0
    ) -> None:
        """`index` is the answer's among the n of its request: each has a stream of its own."""
        self._adjustments = adjustments or Adjustments(params, ())
        self._temperature = params.temperature
        self._cut = Truncation(params.top_k, params.top_p, params.min_p)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        self._chances = np.random.Generator(np.random.PCG64([seed % 2**64, index]))

    @property
    def finished(self) -> bool:
        """No token can follow the last one, as its grammar has it."""
        return self._adjustments.finished

    def choose(self, logits: torch.Tensor) -> int:
        """`logits` [V], fp32, on the host. Raises NonFiniteLogits, GrammarFault."""
        raw: Floats = logits.numpy()
        if self._adjustments.changing:  # else what is chosen tells
            _check(raw)
        scores = self._adjustments.apply(raw)
        best = int(np.argmax(scores))
        _check(scores[best : best + 1])
        token = best if self._temperature < COLDEST else self._draw(scores, best)
        self._adjustments.saw(token)
        return token

    def _draw(self, scores: Floats, best: int) -> int:
        # from the maximum down: dividing by a small temperature cannot overflow
        fallen = torch.from_numpy(scores) - float(scores[best])
        weights: Floats = fallen.div_(self._temperature).exp_().numpy()
        if self._cut.cuts:
            weights = truncated(weights, self._cut)
        return draw(weights, self._chances.random())


def _check(logits: Floats) -> None:
    """numpy's maximum is NaN where any number is, and the place of its maximum that number's."""
    if not np.isfinite(logits.max()):
        raise NonFiniteLogits("the model's logits are not finite")
