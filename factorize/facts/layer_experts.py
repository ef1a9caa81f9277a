"""How many experts each layer takes, so that all of them lose least. No tensors."""

from collections.abc import Mapping, Sequence


def least_loss(losses: Sequence[Mapping[int, float]], total: int) -> tuple[int, ...]:
    """One of each layer's numbers of experts, `total` together at most, of the least sum of losses.

    `losses` of each layer: by its number of experts, what the model loses more (or, below zero,
    less) than with the usual one. They are taken to add up, so this is a knapsack with one choice
    in each layer, solved exactly. Of equal sums the one with fewer experts is taken. Raises
    ValueError where not even the least numbers fit.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in losses:
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (lost, counts) in best.items():
            for count, more in sorted(layer.items()):
                taken = used + count
                if taken <= total and (taken not in found or lost + more < found[taken][0]):
                    found[taken] = (lost + more, (*counts, count))
        best = found
    if not best:
        raise ValueError(f"{total} experts are too few for {len(losses)} layers")
    return min(best.items(), key=lambda each: (each[1][0], each[0]))[1][1]
