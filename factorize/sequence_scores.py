"""Experts that each window's first half chooses for its second, in a stock model (GRIFFIN).

What `moestro serve --experts-mode sequence` does, in plain torch: an oracle for it, and a measure
of what it costs. Letters: S tokens of a window, H hidden size, E experts, k experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moestro.engine import Manifest, RouterFacts, read_config
from moestro.factorize.facts import FactorizeError

Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A router's: logits [S, E], weights and ids [S, k]."""


def prompts_can_choose(folder: Path) -> bool:
    """False for a dense model. Raises FactorizeError where experts differ in weight or number."""
    manifest, routers = Manifest.read(folder), RouterFacts.of(folder)
    if manifest is None:
        config = read_config(folder).get_text_config()
        if getattr(config, "num_experts_per_tok", None) is None:
            return False
        raise FactorizeError(
            f"{folder} was not made by `moestro factorize`: the experts of its answers are chosen "
            "by the server alone"
        )
    if not manifest.has_router or (routers is not None and routers.tau < 1):
        raise FactorizeError(
            f"{folder} has no router that chooses the same number of experts for every token; "
            "measure one with linear routers"
        )
    return True


@contextmanager
def prompts_choose(model: Any) -> Iterator[None]:
    """Inside, the tokens of each window's first half choose as always; those behind have the k

    experts of each layer whose share of the first half's squared activations is largest.
    """
    routers = [layer.block_sparse_moe.router for layer in model.model.layers]
    own = [router.forward for router in routers]
    for layer, forward in zip(model.model.layers, own, strict=True):
        block = layer.block_sparse_moe
        block.router.forward = _PromptRouter(forward, block.experts)
    try:
        yield
    finally:
        for router, forward in zip(routers, own, strict=True):
            router.forward = forward


class _PromptRouter:
    def __init__(self, own: Any, experts: Any) -> None:
        self._own, self._experts = own, experts

    def __call__(self, rows: torch.Tensor) -> Chosen:
        """Of one window [S, H]."""
        logits, weights, ids = self._own(rows)
        half = len(rows) // 2
        chosen = torch.zeros_like(logits[:half]).scatter(1, ids[:half], 1.0)
        parts = chosen * self._energies(rows[:half])
        shares = parts / parts.sum(1, keepdim=True).clamp_min(torch.finfo(parts.dtype).tiny)
        kept = shares.sum(0).topk(ids.shape[1]).indices
        behind = kept.expand(len(rows) - half, -1)
        return logits, weights, torch.cat([ids[:half], behind])

    def _energies(self, rows: torch.Tensor) -> torch.Tensor:
        """[S, E] squared norms of all experts' activations."""
        found = torch.einsum("sh,eoh->seo", rows, self._experts.gate_up_proj)
        gate, up = found.chunk(2, dim=-1)
        squares: torch.Tensor = (self._experts.act_fn(gate) * up).square()
        return squares.sum(-1)
