"""Chooses which neurons of one FFN are always on, and which of the others form an expert together.

Knows activations only, no model. Ties and orders are settled by index, so that equal inputs give
equal splits. Letters: T tokens, H hidden size, I neurons, N routed neurons, E experts, P points.
"""

import torch

from .calibration import LayerSample
from .routing import ridge

CLUSTER_TOKENS = 4096
CLUSTER_ROUNDS = 20
SWAP_LIMIT = 400
RIDGE = 1e-2


def split_neurons(
    sample: LayerSample, shared: int, experts: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(shared [S], groups [E, M]): ascending indices that name each of the I neurons once."""
    heat = sample.neurons.abs().mean(dim=0) * sample.down.norm(dim=0)
    by_heat = heat.argsort(descending=True, stable=True)
    routed = by_heat[shared:].sort().values
    members = cluster(_features(sample, routed), experts, seed)
    groups = torch.stack([routed[members == e] for e in range(experts)])
    first = groups[:, 0].argsort()  # a group's number means nothing: by its first neuron
    return by_heat[:shared].sort().values, groups[first]


def _features(sample: LayerSample, routed: torch.Tensor) -> torch.Tensor:
    """[N, P] what a linear router could foresee of each neuron's size, centred, of length 1.

    Grouping by the foreseeable part keeps together what a router can switch together; it beats
    grouping by the activations themselves, with a router and even with perfect knowledge.
    """
    size = sample.neurons[:, routed].abs() * sample.down[:, routed].norm(dim=0)
    weights = ridge(sample.inputs, size, RIDGE)
    step = max(1, len(sample.inputs) // CLUSTER_TOKENS)
    foreseen = sample.inputs[::step][:CLUSTER_TOKENS] @ weights.T
    return torch.nn.functional.normalize((foreseen - foreseen.mean(dim=0)).T, dim=1)


def cluster(features: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """[N] the cluster of each point: k-means on the sphere with equal sizes (N / experts)."""
    centres = features[_spread_seeds(features, experts, seed)]
    members = assign_equally(features @ centres.T)
    for _ in range(CLUSTER_ROUNDS):
        means = torch.stack([features[members == e].mean(dim=0) for e in range(experts)])
        again = assign_equally(features @ torch.nn.functional.normalize(means, dim=1).T)
        if torch.equal(again, members):
            break
        members = again
    return members


def _spread_seeds(features: torch.Tensor, experts: int, seed: int) -> list[int]:
    """k-means++: far from those before it is likelier."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distance = 1 - features @ features[chosen[0]]
    for _ in range(experts - 1):
        weights = distance.clamp_min(0).square() + 1e-12
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - features @ features[chosen[-1]])
    return chosen


def assign_equally(likeness: torch.Tensor) -> torch.Tensor:
    """[N] from `likeness` [N, E]: every cluster gets N / E points, the decided ones first."""
    points, experts = likeness.shape
    room = [points // experts] * experts
    wishes = likeness.argsort(dim=1, descending=True, stable=True).tolist()
    best = likeness.topk(2, dim=1).values
    members = [0] * points
    for point in (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True).tolist():
        members[point] = next(e for e in wishes[point] if room[e])
        room[members[point]] -= 1
    return _swap(likeness, torch.tensor(members))


def _swap(likeness: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Exchanges the pair that gains most, until none gains."""
    points = len(members)
    for _ in range(SWAP_LIMIT):
        other = likeness[:, members]  # [N, N]: point i in the cluster of point j
        gain = other - other.diagonal()[:, None]
        gain = gain + gain.T
        best, where = gain.flatten().max(dim=0)
        if float(best) <= 1e-6:
            break
        pair = list(divmod(int(where), points))
        members[pair] = members[pair[::-1]]
    return members
