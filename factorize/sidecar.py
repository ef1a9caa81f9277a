"""What a plan's routers need beyond a stock checkpoint: a file of their own beside the weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from moestro.engine import ROUTERS_NAME, RouterFacts, name_routers
from moestro.factorize.facts import Plan

# a power of two: exact, and the order of the experts stays; rows are about 1, so that the softmax
# of the logits rounds to 1/k exactly. Too small for float16, hence a float32 tensor.
ROUTER_SCALE = 2.0**-30
MODULE = "block_sparse_moe.router"


def stock_router(plan: Plan, layer: int) -> dict[str, torch.Tensor]:
    """By name, what a stock checkpoint has of one layer's router; nothing where it has a file."""
    if plan.needs_router_file:
        return {}
    weight = plan.routers[layer].float() * ROUTER_SCALE
    return {f"model.layers.{layer}.{MODULE}.layer.weight": weight}


def write_routers(plan: Plan, folder: Path) -> None:
    """Beside the weights and the stock config.json in `folder`; nothing where those are enough.

    Stock transformers refuses the folder then, which it would answer wrongly from.
    """
    if not plan.needs_router_file:
        return
    parts = plan.router_weights.tensors()
    tensors = {
        f"model.layers.{layer}.{MODULE}.{name}": part[layer].contiguous()
        for name, part in parts.items()
        for layer in range(len(part))
    }
    save_file(tensors, folder / ROUTERS_NAME, {"format": "pt"})
    options, first = plan.facts.options, plan.router_weights.first
    facts = RouterFacts(
        module=MODULE,
        target=options.router,
        hidden=0 if first is None else first.shape[1],
        activation=plan.router_weights.activation,
        bias=int(plan.router_weights.bias is not None),
        tau=float(options.tau),
    )
    name_routers(folder, facts)
