"""The experts of one layer, plugged into stock transformers as the implementation "moestro".

route -> lease -> compute -> combine: the model's own router has chosen; the cache lends each
distinct expert as it arrives; every result goes to its own (token, k) place; the weighted sum over
k is taken once, in fixed order, in fp32. So neither arrival order nor cache size can change a bit.

Shape letters: T tokens, k experts per token, E experts, H width of the experts' input and output.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.cache import ExpertCache, Phase

from .formats import Codec

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


class OffloadedExperts:
    """The experts of one layer, wherever their weights are."""

    def __init__(
        self,
        layer: int,
        cache: ExpertCache,
        step: StepPhase,
        codec: Codec,
        output_scale: float = 1.0,
        after: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.layer = layer
        self.cache = cache
        self.step = step
        self.codec = codec
        self.output_scale = output_scale
        self.after = after  # called with the layer's input when its experts are done: prefetch
        self._input: Any = None  # of the call in progress, as the codec wants it

    def __call__(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens, k = ids.shape
        self._input = self.codec.begin(hidden)
        results = hidden.new_zeros((tokens * k, hidden.shape[1]))  # [T*k, H]
        if tokens == 1:
            self._one_token(module, ids, weights, results)
        else:
            self._many_tokens(module, ids, weights, results)
        if self.after is not None:
            self.after(hidden)
        if self.output_scale != 1.0:
            weights = weights * self.output_scale
        combined = torch.bmm(weights.float()[:, None], results.view(tokens, k, -1))  # [T, 1, H]
        return combined[:, 0].to(hidden.dtype)

    def _one_token(
        self,
        module: torch.nn.Module,
        ids: torch.Tensor,
        weights: torch.Tensor,
        results: torch.Tensor,
    ) -> None:
        """Decoding alone: no sorting, no gathering; place j of `results` is choice j."""
        useful = (weights != 0).tolist()[0]
        num_experts: int = module.num_experts  # type: ignore[assignment]
        places = {
            expert: place
            for place, expert in enumerate(ids.tolist()[0])
            if useful[place] and expert < num_experts
        }
        with self.cache.acquire(self.layer, sorted(places), self.step.phase) as lease:
            for expert, tensors in lease:
                results[places[expert]] = self._compute(module, self._input, tensors)[0]

    def _many_tokens(
        self,
        module: torch.nn.Module,
        ids: torch.Tensor,
        weights: torch.Tensor,
        results: torch.Tensor,
    ) -> None:
        """Expert-major: the tokens of each expert are gathered once and computed together."""
        k, num_experts = ids.shape[1], int(module.num_experts)  # type: ignore[arg-type]
        order, starts = sort_by_expert(ids, weights, num_experts)
        wanted = [expert for expert in range(num_experts) if starts[expert] < starts[expert + 1]]
        with self.cache.acquire(self.layer, wanted, self.step.phase) as lease:
            for expert, tensors in lease:
                places = order[starts[expert] : starts[expert + 1]]
                rows = self.codec.take(self._input, places // k)
                results.index_copy_(0, places, self._compute(module, rows, tensors))

    def _compute(
        self, module: torch.nn.Module, rows: Any, tensors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """[n, H] -> [n, H] through one expert, as the module's own flags say."""
        first = "gate_up_proj" if module.has_gate else "up_proj"
        inner = self._linear(module, rows, tensors, first)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]
        out = self._linear(module, self.codec.begin(inner), tensors, "down_proj")
        return module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]

    def _linear(
        self, module: torch.nn.Module, rows: Any, tensors: dict[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        out = self.codec.multiply(rows, tensors, name, bool(module.is_transposed))
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
