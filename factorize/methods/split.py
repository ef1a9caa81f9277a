"""Chooses which neurons of one FFN are always on, and which of the others form an expert together.

A partition changes no value: the sum of all experts is the dense FFN, whatever the split. Splits
are a table of pure functions; ties go by index, so that equal inputs give equal splits.
Letters: T tokens, H hidden size, I neurons, N routed neurons, E experts, M neurons of one expert.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from .calibration import LayerSample
from .clusters import Room, cluster, cluster_freely
from .routing import ridge

CLUSTER_TOKENS = 4096
RIDGE = 1e-2
SEGMENTS_PER_EXPERT = 8


Groups = Sequence[torch.Tensor]


class Split(Protocol):
    def __call__(
        self, sample: LayerSample, routed: torch.Tensor, experts: int, seed: int
    ) -> Groups:
        """E groups of the neurons `routed` [N], ascending, each named once; in any order.

        N mod E of the groups have one neuron more than the others.
        """


def split_neurons(
    split: str, sample: LayerSample, shared: int, experts: int, seed: int
) -> tuple[torch.Tensor, Groups]:
    """(shared [S], E groups): ascending indices that name each of the I neurons once.

    `split` is a name of SPLITTERS; shared are the hottest, by mean size of their output. Where the
    groups' sizes differ, by one, the larger groups come first.
    """
    by_heat = heat(sample).argsort(descending=True, stable=True)
    routed = by_heat[shared:].sort().values
    groups = [group.sort().values for group in SPLITTERS[split](sample, routed, experts, seed)]
    # a group's number means nothing: by its first neuron
    groups.sort(key=lambda group: (-len(group), int(group[0])))
    return by_heat[:shared].sort().values, groups


def heat(sample: LayerSample) -> torch.Tensor:
    """[I] mean length of what each neuron adds to the output."""
    lengths: torch.Tensor = sample.down.norm(dim=0)
    return sample.neurons.abs().mean(dim=0) * lengths


def contiguous(sample: LayerSample, routed: torch.Tensor, experts: int, seed: int) -> Groups:
    """Slices in the order of the checkpoint: FactorLLM (arXiv 2408.11855)."""
    return routed.tensor_split(experts)


def at_random(sample: LayerSample, routed: torch.Tensor, experts: int, seed: int) -> Groups:
    """A permutation, then slices: FactorLLM (arXiv 2408.11855), LLaMA-MoE (arXiv 2406.16554)."""
    generator = torch.Generator().manual_seed(seed)
    return routed[torch.randperm(len(routed), generator=generator)].tensor_split(experts)


def kmeans(sample: LayerSample, routed: torch.Tensor, experts: int, seed: int) -> Groups:
    """Balanced k-means on the rows of the first matrix, of length 1.

    MoEfication (arXiv 2110.01786); of the gate's rows where the FFN is gated: D2DMoE (arXiv
    2310.04361). Asks for no calibration: what switches a neuron are its weights.
    """
    rows = torch.nn.functional.normalize(sample.gate[routed].float(), dim=1)
    return _grouped(routed, cluster(rows, experts, seed), experts)


def coactivation(sample: LayerSample, routed: torch.Tensor, experts: int, seed: int) -> Groups:
    """Together what a linear router foresees together.

    Grouping by the foreseeable part keeps together what a router can switch together; it beats
    grouping by the activations themselves, with a router and even with perfect knowledge.
    """
    return _grouped(routed, cluster(_foreseen(sample, routed), experts, seed), experts)


def importance(sample: LayerSample, routed: torch.Tensor, experts: int, seed: int) -> Groups:
    """Each expert takes the neurons that matter most to one kind of text.

    After LLaMA-MoE (arXiv 2406.16554): pieces of the calibration text are clustered by their mean
    input; a neuron's importance to a cluster is its mean output there (the paper's also has its
    gradient); the highest importance left goes to its expert until that is full.
    """
    scores = _importance(sample, routed, experts, seed)  # [E, N]
    members = [-1] * len(routed)
    room = Room(len(routed), experts)
    for place in scores.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(place, len(routed))
        if members[neuron] < 0 and room.take(expert):
            members[neuron] = expert
    return _grouped(routed, torch.tensor(members), experts)


SPLITTERS: Mapping[str, Split] = MappingProxyType(
    {
        "coactivation": coactivation,
        "kmeans": kmeans,
        "importance": importance,
        "contiguous": contiguous,
        "random": at_random,
    }
)


def _grouped(routed: torch.Tensor, members: torch.Tensor, experts: int) -> Groups:
    return [routed[members == e] for e in range(experts)]


def _foreseen(sample: LayerSample, routed: torch.Tensor) -> torch.Tensor:
    """[N, tokens] what a line could foresee of each neuron's size, centred, of length 1."""
    size = sample.neurons[:, routed].abs() * sample.down[:, routed].norm(dim=0)
    weights = ridge(sample.inputs, size, RIDGE)
    step = max(1, len(sample.inputs) // CLUSTER_TOKENS)
    foreseen = sample.inputs[::step][:CLUSTER_TOKENS] @ weights.T
    return torch.nn.functional.normalize((foreseen - foreseen.mean(dim=0)).T, dim=1)


def _importance(sample: LayerSample, routed: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """[E, N] mean output size of each neuron in each cluster of text pieces; 0 where none is."""
    length = _segment(len(sample.inputs), sample.window_tokens, experts)
    means = torch.nn.functional.normalize(
        sample.inputs.view(-1, length, sample.inputs.shape[1]).mean(1), dim=1
    )
    clusters = cluster_freely(torch.nn.functional.normalize(means, dim=1), experts, seed)
    size = sample.neurons[:, routed].abs().view(-1, length, len(routed)).mean(1)  # [pieces, N]
    sums = torch.zeros(experts, len(routed)).index_add_(0, clusters, size)
    count = clusters.bincount(minlength=experts).clamp_min(1)
    scores: torch.Tensor = sums / count[:, None] * sample.down[:, routed].norm(dim=0)
    return scores


def _segment(tokens: int, window: int, experts: int) -> int:
    """Tokens of a piece: a window, or halves of it until there are some pieces for each expert."""
    while window % 2 == 0 and tokens // window < SEGMENTS_PER_EXPERT * experts:
        window //= 2
    return window
