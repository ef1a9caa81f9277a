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
    if plan.needs_router_file:
        parts = plan.router_weights.tensors()
        tensors = {
            f"model.layers.{layer}.{MODULE}.{name}": part[layer].contiguous()
            for name, part in parts.items()
            for layer in range(len(part))
        }
        save_file(tensors, folder / ROUTERS_NAME, {"format": "pt"})
    name_own_routers(plan, folder)


def name_own_routers(plan: Plan, folder: Path) -> None:
    """Says in the stock config.json of `folder` what the routers are more than stock ones."""
    options, weights = plan.facts.options, plan.router_weights
    if not plan.needs_router_file and not options.layer_top_k:
        return
    facts = RouterFacts(
        module=MODULE,
        target=options.router,
        hidden=0 if weights.first is None else weights.first.shape[1],
        activation=weights.activation,
        bias=int(weights.bias is not None),
        tau=float(options.tau),
        top_k=options.top_k,
        layer_top_k=options.layer_top_k,
    )
    name_routers(folder, facts)
