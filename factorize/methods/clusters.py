"""k-means on the sphere: with clusters of equal size for neurons, of any size for texts.

Knows points only. Ties and orders are settled by index, so that equal inputs give equal clusters.
Letters: N points, P their dimension, E clusters.
"""

import torch

CLUSTER_ROUNDS = 20
SWAP_LIMIT = 400
SWAP_POINTS = 4096  # with more, a table of all pairs is too large, and a swap gains little


def cluster(features: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """[N] the cluster of each point of length 1 in `features` [N, P]; sizes equal, or one apart."""
    centres = features[_spread_seeds(features, experts, seed)]
    members = assign_equally(features @ centres.T)
    for _ in range(CLUSTER_ROUNDS):
        means = torch.stack([features[members == e].mean(dim=0) for e in range(experts)])
        again = assign_equally(features @ torch.nn.functional.normalize(means, dim=1).T)
        if torch.equal(again, members):
            break
        members = again
    return members


def cluster_freely(features: torch.Tensor, clusters: int, seed: int) -> torch.Tensor:
    """[N] the cluster of each point of length 1 in `features` [N, P]; some may stay empty."""
    centres = features[_spread_seeds(features, clusters, seed)]
    members = (features @ centres.T).argmax(dim=1)
    for _ in range(CLUSTER_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, members, features)
        taken = members.bincount(minlength=clusters) > 0
        centres = torch.where(taken[:, None], torch.nn.functional.normalize(sums, dim=1), centres)
        again = (features @ centres.T).argmax(dim=1)
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


class Room:
    """Places in `clusters` for `points`: as many in each, or in some one more."""

    def __init__(self, points: int, clusters: int) -> None:
        least, self._more = divmod(points, clusters)
        self._left = [least] * clusters

    def take(self, cluster: int) -> bool:
        """False where `cluster` is full."""
        if self._left[cluster] > 0:
            self._left[cluster] -= 1
            return True
        if self._left[cluster] == 0 and self._more:
            self._left[cluster], self._more = -1, self._more - 1
            return True
        return False


def assign_equally(likeness: torch.Tensor) -> torch.Tensor:
    """[N] from `likeness` [N, E]: every cluster gets N / E points, the decided ones first.

    Where N is no multiple of E, N mod E clusters get one more.
    """
    points, experts = likeness.shape
    room = Room(points, experts)
    wishes = likeness.argsort(dim=1, descending=True, stable=True).tolist()
    best = likeness.topk(2, dim=1).values
    members = [0] * points
    for point in (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True).tolist():
        members[point] = next(e for e in wishes[point] if room.take(e))
    return _swap(likeness, torch.tensor(members))


def _swap(likeness: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Exchanges the pair that gains most, until none gains."""
    points = len(members)
    if points > SWAP_POINTS:
        return members
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
