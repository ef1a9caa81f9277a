"""One draw from a softmax that top_k, top_p and min_p cut, without sorting the vocabulary.

A set of the largest is chosen first, and a bound shows that nothing outside it can matter: the
k-th largest of block maxima is at most the k-th largest number; the mass of what was left out is
the whole mass less that of what was kept. V is the vocabulary's size.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BLOCK = 512  # numbers whose maximum or sum is looked at first
LIKELY = 2.0**-10  # of the most likely token's weight: more hardly ever belongs to a nucleus
SORTED_AT_ONCE = 1024
BUCKET_BITS = 16  # leaves 7 of the mantissa's: 128 buckets an octave


@dataclass(frozen=True, slots=True)
class Truncation:
    """What is cut off, in this order. The defaults cut nothing.

    Tokens that tie with the last one kept are kept.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def truncated(weights: Floats, cut: Truncation) -> Floats:
    """`weights` [V], e^(logit - the largest) and so at most 1, with 0 for what is cut off."""
    pool, floors = weights, [np.float32(cut.min_p)]
    if 0 < cut.top_k < len(weights):
        candidates = _candidates(weights, cut.top_k)
        floors.append(np.partition(candidates, -cut.top_k)[-cut.top_k])
        pool = candidates[candidates >= floors[-1]]
    if cut.top_p < 1.0:
        floors.append(nucleus_floor(pool, float(_mass(pool)) * cut.top_p))
    return np.where(weights >= max(floors), weights, np.float32(0))


def largest(numbers: Floats, count: int) -> Ids:
    """Ids of the `count` largest, largest first; of equal ones the lower id first."""
    if count == 0:
        return np.empty(0, np.int64)
    count = min(count, len(numbers))
    candidates = _candidates(numbers, count)
    floor = np.partition(candidates, -count)[-count]
    ids = np.flatnonzero(numbers >= floor)
    order = np.lexsort((ids, -numbers[ids]))
    return ids[order[:count]]


def nucleus_floor(weights: Floats, mass: float) -> np.float32:
    """The weight of the last token of the smallest set of largest weights that holds `mass`."""
    likely, active, above = weights >= LIKELY, weights, 0.0
    if np.count_nonzero(likely) <= SORTED_AT_ONCE:
        active = weights[likely]
    if len(active) > SORTED_AT_ONCE or _mass(active) < mass:
        active, above = _crossing(weights, mass)
    falling = np.sort(active)[::-1]
    reached = above + np.cumsum(falling, dtype=np.float64)
    last = min(int(np.searchsorted(reached, mass)), len(falling) - 1)
    return np.float32(falling[last])


def _crossing(weights: Floats, mass: float) -> tuple[Floats, float]:
    """The weights among which `mass` is reached, counted from the largest; the mass above them.

    All weights of one bucket of a histogram: the upper bits of a positive float order as it does.
    """
    buckets = weights.view(np.int32) >> BUCKET_BITS
    held = np.bincount(buckets, weights=weights)
    reached = np.cumsum(held[::-1])
    top = min(int(np.searchsorted(reached, mass)), len(held) - 1)
    while held[len(held) - 1 - top] == 0.0:  # rounding at the very end
        top -= 1
    bucket = len(held) - 1 - top
    return weights[buckets == bucket], float(reached[top] - held[bucket])


def draw(weights: Floats, chance: float) -> int:
    """The place where `chance` (0 <= chance < 1) of the whole mass is reached, in order of id.

    Sums of blocks first: only the block that holds the place is added up one by one.
    """
    whole = len(weights) // BLOCK * BLOCK
    sums = weights[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float32)
    sums = np.append(sums, weights[whole:].sum(dtype=np.float32)).astype(np.float64)
    reached = np.cumsum(sums)
    wanted = chance * reached[-1]
    block = min(int(np.searchsorted(reached, wanted, side="right")), len(sums) - 1)
    while sums[block] == 0.0:  # rounding at the very end
        block -= 1
    part = weights[block * BLOCK : (block + 1) * BLOCK]
    inside = np.cumsum(part, dtype=np.float64)
    rest = wanted - (reached[block] - sums[block])
    place = min(int(np.searchsorted(inside, rest, side="right")), len(part) - 1)
    while part[place] == 0.0:  # never a token without a chance
        place -= 1
    return block * BLOCK + place


def _candidates(numbers: Floats, count: int) -> Floats:
    """Some of the numbers, surely with the `count` largest among them.

    At least `count` numbers reach the `count`-th largest maximum of a block, each in its block.
    """
    blocks = len(numbers) // BLOCK
    if count * 2 > blocks:
        return numbers
    maxima = numbers[: blocks * BLOCK].reshape(blocks, BLOCK).max(1)
    found: Floats = numbers[numbers >= np.partition(maxima, -count)[-count]]
    return found


def _mass(weights: Floats) -> np.float64:
    return np.float64(weights.sum(dtype=np.float64))
