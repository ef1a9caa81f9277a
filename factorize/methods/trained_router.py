"""Routers that are trained on what experts do, by seeded steps of Adam.

Each paper is a target and a loss in a table; the form of the router is separate: linear without a
bias, which stock checkpoints carry, or with a first layer and a bias as some of the papers have it.
Letters: T tokens, H hidden size, E experts, N neurons of a first layer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn import functional

from moestro.factorize.facts import RouterWeights, SplitOptions

from .routing import Activity, evened

RATE = 1e-2  # falls to nothing along a cosine
BATCH_TOKENS = 1024

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and targets [T, E]


@dataclass(frozen=True, slots=True)
class Lesson:
    targets: Callable[[Activity, int, float], torch.Tensor]  # [T, E]; top_k and the scale in use
    loss: Loss
    activation: str  # behind a first layer, where the user wants one


def nearest_experts(activity: Activity, top_k: int, scale: float) -> torch.Tensor:
    """[T, k] the experts whose outputs are nearest to y / scale.

    |f_e - y / c|^2 less what is equal for all e: |f_e|^2 - (2 / c) <f_e, y>.
    """
    distance = activity.norms.square() - 2 / scale * activity.alignment
    return distance.topk(top_k, dim=1, largest=False).indices


def prior_targets(activity: Activity, top_k: int, scale: float) -> torch.Tensor:
    """softmax of the k-hot vector of the k nearest experts."""
    nearest = nearest_experts(activity, top_k, scale)
    return torch.zeros_like(activity.norms).scatter(1, nearest, 1.0).softmax(dim=1)


def norm_targets(activity: Activity, top_k: int, scale: float) -> torch.Tensor:
    """Output norms, in units of their mean."""
    return activity.norms / activity.norms.mean().clamp_min(1e-20)


def mass_targets(activity: Activity, top_k: int, scale: float) -> torch.Tensor:
    """Each expert's share of its token's activation mass, divided by the largest share of all."""
    share = activity.mass / activity.mass.sum(dim=1, keepdim=True).clamp_min(1e-20)
    return share / share.max()


def reverse_kl(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(softmax(logits) || targets)."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - targets.log())).sum(dim=1).mean()


LESSONS: Mapping[str, Lesson] = MappingProxyType(
    {
        # FactorLLM's Prior-Approximate router (arXiv 2408.11855)
        "prior": Lesson(prior_targets, reverse_kl, "relu"),
        # D2DMoE (arXiv 2310.04361)
        "norm": Lesson(norm_targets, functional.mse_loss, "relu"),
        # MoEfication (arXiv 2110.01786), with the sizes of neurons where it had ReLU's outputs
        "moefication": Lesson(mass_targets, functional.binary_cross_entropy_with_logits, "tanh"),
    }
)


def train_router(activity: Activity, options: SplitOptions, scale: float) -> RouterWeights:
    """`options.router` is a name of LESSONS; equal inputs give equal weights on one machine."""
    lesson = LESSONS[options.router]
    targets = lesson.targets(activity, options.top_k, scale)
    # in units of each input's own size, so that one rate serves all
    size = activity.inputs.square().mean(dim=0).sqrt().clamp_min(1e-6)
    inputs = activity.inputs / size
    draw = torch.Generator().manual_seed(options.seed)
    weights = _untrained(inputs.shape[1], targets.shape[1], options, draw)
    with torch.enable_grad():
        _train(weights, lesson.loss, inputs, targets, options.router_steps, draw)
    last, first, bias = weights.last.detach(), weights.first, weights.bias
    if first is None and bias is None and options.tau == 1:
        return evened(activity.inputs, last / size)
    return RouterWeights(
        (last if first is not None else last / size).to(torch.float16),
        None if first is None else (first.detach() / size).to(torch.float16),
        None if bias is None else bias.detach().to(torch.float16),
        weights.activation,
    )


def activation_of(options: SplitOptions) -> str:
    """Behind the first layer; none where the router has none."""
    return LESSONS[options.router].activation if options.router_hidden else ""


def _untrained(
    hidden: int, experts: int, options: SplitOptions, draw: torch.Generator
) -> RouterWeights:
    """fp32; a linear router starts at nothing, as its loss has one minimum only."""
    width = options.router_hidden
    if not width:
        last, first = torch.zeros(experts, hidden), None
    else:
        first = torch.randn(width, hidden, generator=draw) / math.sqrt(hidden)
        last = torch.randn(experts, width, generator=draw) / math.sqrt(width)
    bias = torch.zeros(experts) if options.router_bias else None
    return RouterWeights(last, first, bias, activation_of(options))


def _train(
    weights: RouterWeights,
    loss: Loss,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    steps: int,
    draw: torch.Generator,
) -> None:
    """In place."""
    adam = torch.optim.Adam([part.requires_grad_() for part in weights.tensors().values()], RATE)
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        batch = torch.randint(len(inputs), (BATCH_TOKENS,), generator=draw)
        adam.zero_grad()
        torch.autograd.backward(loss(weights.logits(inputs[batch]), targets[batch]))
        adam.step()
