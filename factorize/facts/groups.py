"""Which neurons of one FFN each routed expert has, where their number need not be a multiple.

Letters: I neurons, E experts, M places for neurons in each.
"""

import torch
from torch.nn import functional

from .options import SplitOptions


def expert_groups(order: torch.Tensor, options: SplitOptions) -> torch.Tensor:
    """[E, M] neurons of `order` [I], the shared ones first; I stands for none."""
    neurons = len(order)
    width = options.expert_neurons(neurons)
    routed = torch.split(order[options.shared_neurons :].long(), [*options.expert_sizes(neurons)])
    return torch.stack([functional.pad(x, (0, width - len(x)), value=neurons) for x in routed])


def with_none(weights: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`weights` with a row (or, `dim` 1, a column) of zeros behind: what the neuron I has."""
    row = torch.zeros_like(weights.narrow(dim, 0, 1))
    return torch.cat([weights, row], dim=dim)


def expert_members(order: torch.Tensor, options: SplitOptions) -> torch.Tensor:
    """[I] the expert that each neuron belongs to; E for shared ones."""
    members = torch.full((len(order) + 1,), options.experts)
    groups = expert_groups(order, options)
    members[groups.flatten()] = torch.arange(options.experts).repeat_interleave(groups.shape[1])
    return members[:-1]
