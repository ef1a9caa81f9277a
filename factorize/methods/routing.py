"""What experts do for each token, and the router that is solved for rather than trained.

Letters: T tokens, H hidden size, N routed neurons, E experts, M neurons of one of them.
"""

from dataclasses import dataclass

import torch

from moestro.factorize.facts import RouterWeights

from .calibration import LayerSample


@dataclass(frozen=True, slots=True)
class Activity:
    """What each expert would add to each token's output; y is all of them together."""

    inputs: torch.Tensor  # [T, H]
    norms: torch.Tensor  # [T, E] |f_e|
    alignment: torch.Tensor  # [T, E] <f_e, y>
    mass: torch.Tensor  # [T, E] sum of the sizes of the expert's neurons
    output: torch.Tensor  # [T, H] y


def ridge(inputs: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """[targets' width, H] weights without a bias that predict `targets` [T, …] from [T, H].

    `strength` is in units of the mean diagonal of the inputs' second moment.
    """
    moment = inputs.T @ inputs
    moment.diagonal().add_(strength * float(moment.diagonal().mean()))
    weights: torch.Tensor = torch.linalg.solve(moment, inputs.T @ targets)
    return weights.T


def observe(sample: LayerSample, groups: torch.Tensor) -> Activity:
    """`groups` [E, M] indices of neurons."""
    routed = groups.flatten()
    output = sample.neurons[:, routed] @ sample.down[:, routed].T
    norms, alignment, mass = [], [], []
    for group in groups:
        neurons = sample.neurons[:, group]
        part = neurons @ sample.down[:, group].T
        norms.append(part.norm(dim=1))
        alignment.append((part * output).sum(dim=1))
        mass.append(neurons.abs().sum(dim=1))
    return Activity(
        sample.inputs,
        torch.stack(norms, dim=1),
        torch.stack(alignment, dim=1),
        torch.stack(mass, dim=1),
        output,
    )


def fit_ridge(activity: Activity, strength: float) -> RouterWeights:
    """The larger an expert's logit, the larger its output's square root of norm.

    The root keeps few very large outputs from ruling the fit; the order is the same.
    """
    weights = ridge(activity.inputs, activity.norms.sqrt(), strength)
    return evened(activity.inputs, weights)


def evened(inputs: torch.Tensor, weights: torch.Tensor) -> RouterWeights:
    """A linear router in float16 that chooses as `weights` [E, H] does."""
    logits = inputs @ weights.T
    # only differences within a token matter; about 1 in size, float16 holds them and the gates,
    # a softmax of them times a tiny power of two, are even
    weights = (weights - weights.mean(dim=0)) / float((logits - logits.mean(1, True)).std())
    return RouterWeights(weights.to(torch.float16))


def hit_rate(logits: torch.Tensor, norms: torch.Tensor, top_k: int) -> float:
    """The share of each token's `top_k` largest experts that a router's `logits` find."""
    found = logits.topk(top_k, dim=1).indices
    wanted = torch.zeros_like(norms).scatter(1, norms.topk(top_k, dim=1).indices, 1.0)
    return float(wanted.gather(1, found).mean())
