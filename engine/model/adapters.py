"""Classes with experts that transformers' experts interface does not know, given that interface.

Keyed by module class: what a class computes around its experts is written out once more, with the
experts as `experts_hook` takes them. Nothing else in the engine knows a family.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from .experts import experts_hook

Tensors = dict[str, torch.Tensor]


def adapt(model: PreTrainedModel) -> None:
    """Give every experts module of `model`, built on meta, the interface."""
    for module in list(model.modules()):
        kind = type(module)
        adapter = ADAPTERS.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
        if adapter is not None:
            adapter(module, model)


def _offer(
    experts: Any,
    num_experts: int,
    *,
    transposed: bool = False,
    activate: Callable[[torch.Tensor], torch.Tensor] | None = None,
    arrange: Callable[[Tensors], Tensors] | None = None,
) -> None:
    """What the decorator of transformers would set. `activate`: [n, 2 I] -> [n, I].

    `arrange`: tensors as the class keeps them -> gate_up_proj and down_proj [E, ...].
    """
    experts.num_experts, experts.is_transposed = num_experts, transposed
    experts.has_gate, experts.is_concatenated = True, True
    experts.has_bias = experts.has_post_expert_norm = False
    if activate is not None:
        experts.__dict__["_apply_gate"] = activate
    if arrange is not None:
        experts.__dict__["moestro_arrange"] = arrange


class _Chooser(torch.nn.Module):
    """Rows [T, H] -> shares and ids [T, k]: the choice as a module, which a guess can ask, too."""

    def __init__(self, choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._choose = choose

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._choose(rows)


def _gated(act: Callable[[torch.Tensor], torch.Tensor], inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return act(gate) * up


def _step3p7(experts: Any, _: PreTrainedModel) -> None:
    _offer(experts, experts.num_experts)
    experts.forward = partial(experts_hook, experts)


def _longcat_flash(experts: Any, _: PreTrainedModel) -> None:
    """Experts behind the routed ones give back what they get."""
    count: int = experts.num_routed_experts

    def arrange(tensors: Tensors) -> Tensors:
        return {name: tensor[:count] for name, tensor in tensors.items()}

    def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        routed: torch.Tensor = experts_hook(experts, hidden, ids, weights)
        unchanged: torch.Tensor = (weights * (ids >= count)).sum(1, keepdim=True)
        return routed + hidden * unchanged.to(hidden.dtype)

    _offer(experts, count, activate=partial(_gated, experts.act_fn), arrange=arrange)
    experts.forward = forward


def _dbrx(experts: Any, _: PreTrainedModel) -> None:
    """All experts' rows lie behind each other, the last matrix as [in, out]."""
    glu = experts.mlp
    shape = (-1, glu.ffn_hidden_size, glu.hidden_size)

    def arrange(tensors: Tensors) -> Tensors:
        gate, up, down = (tensors[name].view(shape) for name in ("w1", "v1", "w2"))
        return {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down.transpose(1, 2)}

    def forward(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        found: torch.Tensor = experts_hook(glu, flat, ids, weights).view(hidden.shape)
        return found

    activate = partial(_gated, glu.activation_fn)
    _offer(glu, experts.num_experts, activate=activate, arrange=arrange)
    experts.forward = forward


def _llama4(moe: Any, _: PreTrainedModel) -> None:
    """A share weighs what its expert reads, not what it gives."""
    experts = moe.experts
    moe.chooser = _Chooser(lambda rows: moe.router(rows)[0].topk(moe.top_k, dim=1))

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden.reshape(-1, moe.hidden_dim)
        shares, ids = moe.chooser(rows)
        read = (rows[:, None] * shares[..., None]).flatten(0, 1)
        gave = experts_hook(experts, read, ids.reshape(-1, 1), torch.ones_like(shares).view(-1, 1))
        return moe.shared_expert(rows) + gave.view(*ids.shape, -1).sum(1), shares

    _offer(experts, experts.num_experts, transposed=True, activate=partial(_gated, experts.act_fn))
    moe.forward = forward


def _jetmoe(moe: Any, model: PreTrainedModel) -> None:
    """Two stacks of matrices become one experts module; the experts of its attention stay dense."""
    experts: Any = torch.nn.Module()
    experts.gate_up_proj, experts.down_proj = moe.input_linear.weight, moe.output_linear.weight
    del moe.input_linear, moe.output_linear
    moe.experts, router = experts, moe.router

    def choose(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best, ids = router.layer(rows).float().topk(router.top_k, dim=1)
        return best.softmax(1).to(rows.dtype), ids

    moe.chooser = _Chooser(choose)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        shares, ids = moe.chooser(rows)
        found: torch.Tensor = experts_hook(experts, rows, ids, shares) + moe.bias
        return found.view(hidden.shape)

    _offer(experts, router.num_experts, activate=partial(_gated, moe.activation))
    moe.forward = forward
    model.__dict__["moestro_renamings"] = [
        WeightRenaming(r"mlp\.input_linear\.weight", "mlp.experts.gate_up_proj"),
        WeightRenaming(r"mlp\.output_linear\.weight", "mlp.experts.down_proj"),
    ]


def _jetmoe_gating(gating: Any, _: PreTrainedModel) -> None:
    """Of its attention too. Its own counts rows on the host, which on meta have no numbers."""

    def forward(rows: torch.Tensor) -> tuple[Any, ...]:
        logits = gating.layer(rows).float()
        best, ids = logits.topk(gating.top_k, dim=1)
        shares, flat = best.softmax(1).to(rows.dtype).flatten(), ids.flatten()
        order = flat.sort(stable=True).indices
        counts = [len(flat)] + [0] * (gating.num_experts - 1)
        if not flat.is_meta:
            counts = flat.bincount(minlength=gating.num_experts).tolist()
        return order, order // gating.top_k, shares[order], counts, logits

    gating.forward = forward


ADAPTERS: dict[str, Callable[[Any, PreTrainedModel], None]] = {
    "modeling_dbrx.DbrxExperts": _dbrx,
    "modeling_jetmoe.JetMoeMoE": _jetmoe,
    "modeling_jetmoe.JetMoeTopKGating": _jetmoe_gating,
    "modeling_llama4.Llama4TextMoe": _llama4,
    "modeling_longcat_flash.LongcatFlashExperts": _longcat_flash,
    "modeling_step3p7.Step3p7Experts": _step3p7,
}
