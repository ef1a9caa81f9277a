"""Routing simulated in the dense model: every neuron is computed, and what is not chosen is zeroed.

Exactly what the factorized twin computes, without a folder to build, and quick on long texts. The
masks stand in front of the down projection. Letters: T tokens, H hidden size, I neurons, E experts,
L layers, G prompts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moestro.engine import in_proportion
from moestro.factorize import Deltas, Plan

PARTS = (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))


@dataclass(frozen=True, slots=True)
class Sections:
    """Of one call: each token's prompt [T] in 0 .. G - 1, and whether it is part of it [T]."""

    group: torch.Tensor
    prompt: torch.Tensor

    @classmethod
    def halves(cls, tokens: int) -> "Sections":
        """One window whose first half is the prompt."""
        return cls(torch.zeros(tokens, dtype=torch.long), torch.arange(tokens) < tokens // 2)


class Choice(Protocol):
    def __call__(
        self, layer: int, inputs: torch.Tensor, neurons: torch.Tensor, sections: Sections
    ) -> torch.Tensor:
        """`neurons` [T, I] with zeros where they are not chosen; `inputs` [T, H] of the FFN."""


@dataclass(frozen=True, slots=True)
class Oracle:
    """The neurons that add most to each token's output: what no router can know beforehand."""

    count: int
    lengths: torch.Tensor  # [L, I] of the down projection's columns

    def __call__(
        self, layer: int, inputs: torch.Tensor, neurons: torch.Tensor, sections: Sections
    ) -> torch.Tensor:
        chosen = (neurons.abs() * self.lengths[layer]).topk(self.count, dim=1, sorted=False).indices
        return torch.zeros_like(neurons).scatter_(1, chosen, neurons.gather(1, chosen))


@dataclass(frozen=True, slots=True)
class Griffin:
    """GRIFFIN (arXiv 2404.01365): a prompt chooses the neurons of all that follows it.

    By the root of the sum of squares over its tokens, each token's activity first brought to length
    1. The prompt itself runs whole.
    """

    count: int

    def __call__(
        self, layer: int, inputs: torch.Tensor, neurons: torch.Tensor, sections: Sections
    ) -> torch.Tensor:
        squares = torch.nn.functional.normalize(neurons, dim=1).square()
        groups = int(sections.group.max()) + 1
        sums = torch.zeros(groups, neurons.shape[1])
        sums.index_add_(0, sections.group[sections.prompt], squares[sections.prompt])
        chosen = sums.topk(self.count, dim=1).indices
        keep = torch.zeros_like(sums).scatter_(1, chosen, 1.0)[sections.group]  # [T, I]
        return torch.where(sections.prompt[:, None], neurons, neurons * keep)


@dataclass(frozen=True, slots=True)
class Experts:
    """A plan's: shared neurons always, of the others those of the `top_k` largest logits' experts,

    or what a layer has where so many are asked for. While `chosen` is a list, each call adds its
    experts [T, k] there.
    """

    plan: Plan
    top_k: int
    chosen: list[torch.Tensor] | None = None
    _members: list[torch.Tensor] = field(default_factory=list)  # [I] of each layer; E: shared

    def __post_init__(self) -> None:
        options = self.plan.facts.options
        for order in self.plan.order.long():
            members = torch.full_like(order, options.experts)
            routed = order[options.shared_neurons :]
            size = len(routed) // options.experts
            members[routed] = torch.arange(options.experts).repeat_interleave(size)
            self._members.append(members)

    def __call__(
        self, layer: int, inputs: torch.Tensor, neurons: torch.Tensor, sections: Sections
    ) -> torch.Tensor:
        logits = inputs @ self.plan.routers[layer].float().T
        options, own = self.plan.facts.options, self.plan.layer_counts[layer]
        count = in_proportion(own, options.top_k, self.top_k, options.experts)
        experts = logits.topk(count, dim=1).indices
        if self.chosen is not None:
            self.chosen.append(experts)
        factors = torch.zeros(len(inputs), logits.shape[1] + 1)
        factors.scatter_(1, experts, float(self.plan.scales[layer]))
        factors[:, -1] = 1.0
        return neurons * factors[:, self._members[layer]]


def column_lengths(model: Any) -> torch.Tensor:
    """[L, I] of the down projections."""
    layers = model.model.layers
    return torch.stack([layer.mlp.down_proj.weight.detach().norm(dim=0) for layer in layers])


def add_deltas(model: Any, deltas: Deltas) -> None:
    """To the dense model's FFN weights, in place."""
    for number, layer in enumerate(model.model.layers):
        for name, part in PARTS:
            weight = getattr(layer.mlp, name).weight
            weight.data = deltas.add_to(weight.data, part, number)


class Simulation:
    """`model` under a choice; None is the dense model itself."""

    def __init__(self, model: Any, choice: Choice | None) -> None:
        self.model = model
        self._choice = choice
        self._sections: Sections | None = None
        self._inputs = torch.empty(0)

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor, sections: Sections, **arguments: Any) -> torch.Tensor:
        """[T, H] behind the last norm, of one row of `ids` [T]."""
        self._sections = sections
        with self._hooked():
            out = self.model.model(ids[None], use_cache=False, **arguments)
        found: torch.Tensor = out.last_hidden_state[0]
        return found

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, V] fp32."""
        found: torch.Tensor = self.model.lm_head(hidden).float()
        return found

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = []
        if self._choice is not None:
            for number, layer in enumerate(self.model.model.layers):
                hooks.append(layer.mlp.register_forward_pre_hook(self._keep_inputs))
                mask = self._mask(number, self._choice)
                hooks.append(layer.mlp.down_proj.register_forward_pre_hook(mask))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep_inputs(self, _module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self._inputs = arguments[0][0]

    def _mask(self, layer: int, choice: Choice) -> Callable[..., tuple[torch.Tensor]]:
        def masked(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            assert self._sections is not None
            return (choice(layer, self._inputs, arguments[0][0], self._sections)[None],)

        return masked
