"""The experts of one layer, plugged into stock transformers as the implementation "moestro".

route -> lease -> compute -> combine: the model's own router has chosen; the cache lends each
distinct expert as it arrives; every result goes to its own (token, k) place; the weighted sum over
k is taken once, in fixed order, in fp32. So neither arrival order nor cache size can change a bit.

Shape letters: T tokens, k experts per token, E experts, H width of the experts' input and output.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.cache import ExpertCache, Phase

NAME = "moestro"


class ExpertsFunction(Protocol):
    """What runs in place of an experts module's `forward`."""

    def __call__(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor: ...


def experts_hook(
    module: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`hidden` [T, H], `ids` and `weights` [T, k] -> [T, H]."""
    function: ExpertsFunction = module.moestro_experts  # type: ignore[assignment]  # `bind` did
    return function(module, hidden, ids, weights)


def register() -> None:
    """Make the name "moestro" known to transformers, for experts."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_hook)


def bind(module: torch.nn.Module, function: ExpertsFunction) -> None:
    """Let `module` (an experts module) run `function`."""
    module.__dict__["moestro_experts"] = function


class StepPhase:
    """Which phase the step in progress is in; set by the runner, read by every layer."""

    def __init__(self) -> None:
        self.phase = Phase.DECODE


class Widening:
    """Weights in the compute dtype: the view itself, or a copy in one reused buffer.

    A widened tensor is valid until the next one is asked for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == self.dtype:
            return weight
        if self._buffer.numel() < weight.numel():
            self._buffer = torch.empty(weight.numel(), dtype=self.dtype, device=weight.device)
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


class OffloadedExperts:
    """The experts of one layer, wherever their weights are."""

    def __init__(
        self,
        layer: int,
        cache: ExpertCache,
        step: StepPhase,
        widen: Widening,
        output_scale: float = 1.0,
        after: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.layer = layer
        self.cache = cache
        self.step = step
        self.widen = widen
        self.output_scale = output_scale
        self.after = after  # called with the layer's input when its experts are done: prefetch

    def __call__(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens, k = ids.shape
        num_experts: int = module.num_experts  # type: ignore[assignment]
        order, starts = sort_by_expert(ids, weights, num_experts)
        wanted = [expert for expert in range(num_experts) if starts[expert] < starts[expert + 1]]
        results = hidden.new_zeros((tokens * k, hidden.shape[1]))  # [T*k, H]
        with self.cache.acquire(self.layer, wanted, self.step.phase) as lease:
            for expert, tensors in lease:
                places = order[starts[expert] : starts[expert + 1]]
                rows = hidden if tokens == 1 else hidden.index_select(0, places // k)
                results.index_copy_(0, places, self._compute(module, rows, tensors))
        if self.after is not None:
            self.after(hidden)
        scaled = (
            weights.float() if self.output_scale == 1.0 else weights.float() * self.output_scale
        )
        combined = torch.bmm(scaled[:, None], results.view(tokens, k, -1).float())  # [T, 1, H]
        return combined[:, 0].to(hidden.dtype)

    def _compute(
        self, module: torch.nn.Module, rows: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """[n, H] -> [n, H] through one expert, as the module's own flags say."""
        first = "gate_up_proj" if module.has_gate else "up_proj"
        inner = self._linear(module, rows, tensors, first)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]
        out = self._linear(module, inner, tensors, "down_proj")
        return module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]

    def _linear(
        self,
        module: torch.nn.Module,
        rows: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        name: str,
    ) -> torch.Tensor:
        weight = self.widen(tensors[name])
        out = rows @ weight if module.is_transposed else F.linear(rows, weight)
        if module.has_bias:
            out += tensors[f"{name}_bias"].to(out.dtype)
        return out


def sort_by_expert(
    ids: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, list[int]]:
    """Places t * k + j of `ids` [T, k] grouped by expert; group e is [starts[e], starts[e + 1]).

    Ids from `num_experts` on ("contributes nothing") and places of weight 0 are in no group, so
    that no expert is loaded for nothing.
    """
    flat = ids.reshape(-1)
    keyed = torch.where(weights.reshape(-1) == 0, num_experts, flat).clamp_(max=num_experts)
    order = keyed.argsort(stable=True)
    counts = torch.bincount(keyed, minlength=num_experts + 1).tolist()
    starts = [0]
    for count in counts[:num_experts]:
        starts.append(starts[-1] + count)
    return order, starts


def experts_in_rank_order(ids: torch.Tensor) -> Iterable[int]:
    """Distinct experts of `ids` [T, k], the first choices of all tokens before the second ones."""
    return dict.fromkeys(ids.t().reshape(-1).tolist())
