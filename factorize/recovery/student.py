"""The dense model made to compute what its factorized twin will, differentiable: the student.

All neurons are computed and those of experts that the router leaves out are set to zero: slower
than the twin, but in products that are fast. With the masks off it is the teacher. Letters:
T tokens, H hidden size, I neurons, E experts, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moestro.engine import in_proportion
from moestro.factorize.facts import PARTS, Deltas, Plan, expert_members

ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


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

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs.to(self.dtype), self.weight, self.bias).to(inputs.dtype)

    def back(self, slopes: torch.Tensor) -> torch.Tensor:
        """Slopes by the inputs of slopes by the outputs [T, O]."""
        return (slopes.to(self.dtype) @ self.weight).to(slopes.dtype)


class LowRank(nn.Module):
    """A linear layer of the teacher, and what the student adds to it: `into` after `out_of`, and

    `whole` [outputs, inputs], which does not learn.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = FrozenLinear(linear)
        outputs, inputs = self.shape = tuple(linear.weight.shape)
        first = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.out_of = nn.Parameter(first)  # [r, inputs]
        self.into = nn.Parameter(torch.zeros(outputs, rank))  # [outputs, r]
        self.whole: torch.Tensor | None = None

    def add(self, update: torch.Tensor) -> None:
        """Adds `update` [outputs, inputs] to `whole`."""
        self.whole = update if self.whole is None else self.whole + update

    @torch.no_grad()
    def begin_at(self, deltas: Deltas, part: str, layer: int) -> None:
        """Sets what is added to what `deltas` say, cut to their first vectors, the largest ones."""
        if (whole := deltas.tensors.get(f"{part}.whole")) is not None:
            self.whole = whole[layer].float()
        if (thin := deltas.thin(part, layer)) is None:
            return
        columns, rows, scales = (tensor.float() for tensor in thin)
        rank = min(len(scales), len(self.out_of))
        columns, rows, scales = columns[:, :rank], rows[:rank], scales[:rank]
        lengths = rows.norm(dim=1).clamp_min(1e-30)  # as long as those that a run begins with
        self.out_of[:rank] = rows / lengths[:, None]
        self.into[:, :rank] = columns * (scales * lengths)

    def forward(self, inputs: torch.Tensor, *, changed: bool) -> torch.Tensor:
        found: torch.Tensor = self.linear(inputs)
        if changed:
            found = found + (inputs @ self.out_of.T) @ self.into.T
        if changed and self.whole is not None:
            found = found + functional.linear(inputs, self.whole)
        return found


class StudentFFN(nn.Module):
    """One FFN. `top_k` None is the teacher's: every neuron, the weights as they were.

    `prompt_tokens`: of each window; what they chose, all tokens behind them have (mode sequence).
    """

    def __init__(
        self,
        mlp: nn.Module,
        members: torch.Tensor,
        router: torch.Tensor,
        rank: int,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.act_fn: Any = mlp.act_fn
        self.gate = LowRank(_linear(mlp, "gate_proj"), rank, generator)
        self.up = LowRank(_linear(mlp, "up_proj"), rank, generator)
        self.down = LowRank(_linear(mlp, "down_proj"), rank, generator)
        self.router = router.float()  # [E, H]
        self.top_k: int | None = None
        self.prompt_tokens: int | None = None
        self.scale = scale  # of the sum of the experts that are on
        self.members = members  # [I] the expert of each neuron; E: it is always on

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        changed = self.top_k is not None
        neurons = self.act_fn(self.gate(inputs, changed=changed)) * self.up(inputs, changed=changed)
        if self.top_k is not None:
            mask = largest(inputs.detach() @ self.router.T, self.top_k)
            if self.prompt_tokens is not None:
                mask = self._chosen_by_prompt(mask, neurons, self.top_k, self.prompt_tokens)
            mask = mask * self.scale
            always = torch.ones_like(mask[..., :1])
            neurons = neurons * torch.cat([mask, always], dim=-1)[..., self.members]
        output: torch.Tensor = self.down(neurons, changed=changed)
        return output

    def _chosen_by_prompt(
        self, mask: torch.Tensor, neurons: torch.Tensor, top_k: int, tokens: int
    ) -> torch.Tensor:
        """`mask` [N, S, E], behind the first `tokens` the `top_k` experts of largest share there.

        The share is the engine's: each routed expert's part of a token's squared activations.
        """
        with torch.no_grad():
            experts = mask.shape[-1]
            squares = neurons[:, :tokens].square()
            energies = squares.new_zeros(*squares.shape[:2], experts + 1)
            energies.index_add_(-1, self.members, squares)
            energies = energies[..., :experts] * mask[:, :tokens].round()
            shares = energies / energies.sum(-1, keepdim=True).clamp_min(1e-30)
            kept = shares.sum(1).topk(top_k, dim=-1).indices  # [N, k]
            chosen = torch.zeros_like(mask[:, 0]).scatter(-1, kept, 1.0)
            behind = chosen[:, None].expand(-1, mask.shape[1] - tokens, -1)
        return torch.cat([mask[:, :tokens], behind], dim=1)


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it: others take longer than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def largest(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """[..., E] ones for the `top_k` largest of `logits`."""
    return torch.zeros_like(logits).scatter(-1, logits.topk(top_k, dim=-1).indices, 1.0)


class Student:
    """`model` with its FFNs replaced; `parameters` are what learns."""

    def __init__(self, model: Any, plan: Plan, rank: int, start: Deltas | None = None) -> None:
        """`start`: deltas of `plan` to begin with."""
        self.model = model.requires_grad_(False)
        self.plan = plan
        model.lm_head = FrozenLinear(model.lm_head)
        self.ffns: list[StudentFFN] = []
        for layer, order, router, scale in zip(
            model.model.layers, plan.order.long(), plan.routers, plan.scales.tolist(), strict=True
        ):
            members = expert_members(order, plan.facts.options)
            layer.mlp = StudentFFN(layer.mlp, members, router, rank, scale)
            for name in ATTENTION_PARTS:
                setattr(layer.self_attn, name, FrozenLinear(getattr(layer.self_attn, name)))
            self.ffns.append(layer.mlp)
        for number, ffn in enumerate(self.ffns):
            for part in PARTS if start is not None else ():
                getattr(ffn, part).begin_at(start, part, number)

    def parts(self) -> list[LowRank]:
        """Of all layers."""
        return [part for ffn in self.ffns for part in (ffn.gate, ffn.up, ffn.down)]

    def learning(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by kind: `out_of` and `into` of the low-rank deltas."""
        parts = self.parts()
        return {"out_of": [part.out_of for part in parts], "into": [part.into for part in parts]}

    @contextmanager
    def active(self, top_k: int | None, prompt_tokens: int | None = None) -> Iterator[None]:
        """Inside, `top_k` experts of each layer, or what it has where a token is said to have so

        many; None is the teacher.
        """
        options = self.plan.facts.options
        for ffn, own in zip(self.ffns, self.plan.layer_counts, strict=True):
            ffn.prompt_tokens = prompt_tokens
            if top_k is not None:
                ffn.top_k = in_proportion(own, options.top_k, top_k, options.experts)
        try:
            yield
        finally:
            for ffn in self.ffns:
                ffn.top_k = ffn.prompt_tokens = None

    def hidden(
        self, ids: torch.Tensor, top_k: int | None, prompt_tokens: int | None = None
    ) -> torch.Tensor:
        """[N, S, H] after the last norm, of windows `ids` [N, S]."""
        with self.active(top_k, prompt_tokens):
            found: torch.Tensor = self.model.model(ids, use_cache=False).last_hidden_state
        return found

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.log_softmax(self.model.lm_head(hidden).float(), dim=-1)


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    found = mlp.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found
