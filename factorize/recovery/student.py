"""The dense model made to compute what its factorized twin will, differentiable: the student.

All neurons are computed and those of experts that the router leaves out are set to zero: slower
than the twin, but gradients reach the weights, the router and what was left out. With the masks off
it is the teacher. Letters: T tokens, H hidden size, I neurons, E experts, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moestro.factorize.facts import Plan

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE_WIDTH = 0.5  # of the logistic curve that stands in for the mask's derivative, in logits


class FrozenLinear(nn.Module):
    """`x W^T` of weights that do not learn, in bfloat16 where they and the processor are such."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        narrow = weight.to(torch.bfloat16)
        self.bias = getattr(linear, "bias", None)
        exact = self.bias is None and torch.equal(narrow.float(), weight)
        self.dtype = torch.bfloat16 if exact and _multiplies_bfloat16() else weight.dtype
        self.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)

    def add(self, update: torch.Tensor) -> None:
        """Adds `update` [outputs, inputs] to the weights, in their own precision or float32."""
        self.dtype = torch.float32
        self.weight.data = self.weight.data.float() + update

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs.to(self.dtype), self.weight, self.bias).to(inputs.dtype)


class LowRank(nn.Module):
    """A linear layer of the teacher, and beside it what is added to it: `into` after `out_of`."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = FrozenLinear(linear)
        outputs, inputs = linear.weight.shape
        first = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.out_of = nn.Parameter(first)  # [r, inputs]
        self.into = nn.Parameter(torch.zeros(outputs, rank))  # [outputs, r]

    def forward(self, inputs: torch.Tensor, *, changed: bool) -> torch.Tensor:
        found: torch.Tensor = self.linear(inputs)
        if changed:
            found = found + (inputs @ self.out_of.T) @ self.into.T
        return found

    def delta(self) -> torch.Tensor:
        return self.into.detach() @ self.out_of.detach()


class StudentFFN(nn.Module):
    """One FFN. `top_k` None is the teacher's: every neuron, the weights as they were."""

    def __init__(
        self,
        mlp: nn.Module,
        order: torch.Tensor,
        router: torch.Tensor,
        shared: int,
        rank: int,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        experts = len(router)
        self.act_fn: Any = mlp.act_fn
        self.gate = LowRank(_linear(mlp, "gate_proj"), rank, generator)
        self.up = LowRank(_linear(mlp, "up_proj"), rank, generator)
        self.down = LowRank(_linear(mlp, "down_proj"), rank, generator)
        self.router = nn.Parameter(router.float())  # [E, H]
        self.top_k: int | None = None
        self.scale = scale  # of the sum of the experts that are on
        members = torch.empty(len(order), dtype=torch.long)
        members[order[:shared]] = experts  # the column that is always on
        members[order[shared:]] = torch.arange(experts).repeat_interleave(
            (len(order) - shared) // experts
        )
        self.members = members  # of each neuron

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        changed = self.top_k is not None
        neurons = self.act_fn(self.gate(inputs, changed=changed)) * self.up(inputs, changed=changed)
        if self.top_k is not None:
            mask = straight_through(inputs @ self.router.T, self.top_k) * self.scale
            always = torch.ones_like(mask[..., :1])
            neurons = neurons * torch.cat([mask, always], dim=-1)[..., self.members]
        output: torch.Tensor = self.down(neurons, changed=changed)
        return output


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it: others take longer than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def straight_through(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """[..., E] ones for the `top_k` largest of `logits`; backwards, a logistic curve round their

    border (Bengio et al., 2013, "Estimating or propagating gradients through stochastic neurons").
    """
    ranked = logits.detach().topk(min(top_k + 1, logits.shape[-1]), dim=-1)
    mask = torch.zeros_like(logits).scatter(-1, ranked.indices[..., :top_k], 1.0)
    border = ranked.values[..., top_k - 1 :].mean(dim=-1, keepdim=True)
    soft = torch.sigmoid((logits - border) / GATE_WIDTH)
    return mask + soft - soft.detach()


class Student:
    """`model` with its FFNs replaced; `parameters` are what learns."""

    def __init__(self, model: Any, plan: Plan, rank: int) -> None:
        self.model = model.requires_grad_(False)
        model.lm_head = FrozenLinear(model.lm_head)
        shared = plan.facts.options.shared_neurons
        self.ffns: list[StudentFFN] = []
        for layer, order, router, scale in zip(
            model.model.layers, plan.order.long(), plan.routers, plan.scales.tolist(), strict=True
        ):
            layer.mlp = StudentFFN(layer.mlp, order, router, shared, rank, scale)
            for name in ATTENTION_PARTS:
                setattr(layer.self_attn, name, FrozenLinear(getattr(layer.self_attn, name)))
            self.ffns.append(layer.mlp)

    def learning(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by kind: `out_of` and `into` of the low-rank deltas, `routers`."""
        parts = [part for ffn in self.ffns for part in (ffn.gate, ffn.up, ffn.down)]
        return {
            "out_of": [part.out_of for part in parts],
            "into": [part.into for part in parts],
            "routers": [ffn.router for ffn in self.ffns],
        }

    @contextmanager
    def active(self, top_k: int | None) -> Iterator[None]:
        """Inside, `top_k` experts of each layer; None is the teacher."""
        for ffn in self.ffns:
            ffn.top_k = top_k
        try:
            yield
        finally:
            for ffn in self.ffns:
                ffn.top_k = None

    def hidden(self, ids: torch.Tensor, top_k: int | None) -> torch.Tensor:
        """[N, S, H] after the last norm, of windows `ids` [N, S]."""
        with self.active(top_k):
            found: torch.Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return found

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.log_softmax(self.model.lm_head(hidden).float(), dim=-1)


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    found = mlp.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found
