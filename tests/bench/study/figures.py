"""The arithmetic between records and the table. Knows no model.

Losses are mean negative log-likelihoods in nats per token, [text][window].
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAPS = 2000
INTERVAL = (2.5, 97.5)  # percentiles

Losses = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Estimate:
    value: float
    error: float  # standard error


def perplexities(losses: Losses) -> list[float]:
    """Of each text; its windows score equally many tokens."""
    return [math.exp(statistics.fmean(windows)) for windows in losses]


def mean_loss(losses: Losses) -> float:
    """Over texts, each with the same weight."""
    return statistics.fmean(statistics.fmean(windows) for windows in losses)


def ratio(losses: Losses, dense: Losses) -> Estimate:
    """Geometric mean over texts of perplexity / dense.

    Its standard error is of differences of losses, window by window on the same tokens: what makes
    a window hard for both is not counted. With one window a text there is none (nan).
    """
    pairs = zip(losses, dense, strict=True)
    differences = [
        [one - other for one, other in zip(ours, theirs, strict=True)] for ours, theirs in pairs
    ]
    value = math.exp(statistics.fmean(statistics.fmean(each) for each in differences))
    if any(len(each) < 2 for each in differences):
        return Estimate(value, math.nan)
    variances = [statistics.variance(each) / len(each) for each in differences]
    return Estimate(value, value * math.sqrt(sum(variances)) / len(variances))


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one task: which questions were answered rightly, and each one's number of choices."""

    right: Sequence[bool]
    choices: Sequence[int]

    @property
    def accuracy(self) -> Estimate:
        share = sum(self.right) / len(self.right)
        return Estimate(share, math.sqrt(share * (1 - share) / len(self.right)))

    def above_chance(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """[questions] 1 or 0, less 1 / choices."""
        return np.asarray(self.right, float) - 1 / np.asarray(self.choices, float)


@dataclass(frozen=True, slots=True)
class Kept:
    """The share of the dense model's above-chance accuracy that is left, over all questions."""

    above_chance: float  # of the row itself
    share: float
    low: float
    high: float


def pooled_above_chance(tasks: Mapping[str, Answers]) -> float:
    """Over the questions of all tasks together."""
    return float(np.concatenate([tasks[name].above_chance() for name in sorted(tasks)]).mean())


def kept(row: Mapping[str, Answers], dense: Mapping[str, Answers], seed: int) -> Kept | None:
    """With a bootstrap interval (Efron, 1979): questions drawn anew within each task, the same for

    both models. None where the dense model is not above chance in every draw: there is nothing to
    keep a share of. Raises ValueError where the two did not answer the same questions.
    """
    draw = np.random.default_rng(seed)
    ours, theirs = np.zeros(BOOTSTRAPS), np.zeros(BOOTSTRAPS)
    sums, total = np.zeros(2), 0
    if row.keys() != dense.keys():
        raise ValueError("the two rows have answered different tasks")
    for task in sorted(row):
        if list(row[task].choices) != list(dense[task].choices):
            raise ValueError(f"the two rows have answered different questions of {task}")
        one, other = row[task].above_chance(), dense[task].above_chance()
        picked = draw.integers(len(one), size=(BOOTSTRAPS, len(one)))
        ours += one[picked].sum(axis=1)
        theirs += other[picked].sum(axis=1)
        sums += (one.sum(), other.sum())
        total += len(one)
    if theirs.min() <= 0 or sums[1] <= 0:
        return None
    low, high = np.percentile(ours / theirs, INTERVAL)
    return Kept(float(sums[0] / total), float(sums[0] / sums[1]), float(low), float(high))
