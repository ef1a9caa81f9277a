"""Guesses the next layer's experts while this one's results are put together.

The next layer's own router is asked, with this layer's input rescaled by the ratio of the two
norms' weights: both layers normalise nearly the same residual (next-gate prefetch; arXiv
2308.12066 and others). A guess may always be ignored; it never changes what is computed.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moestro.cache import ExpertCache

from .experts import experts_in_rank_order
from .topology import RouterPlace, Topology

EXPERTS_PER_LAYER = 1  # more than one has cost more than it gained wherever it was measured
MOST_TOKENS = 32  # beyond, nearly all experts of a layer run and a guess says nothing


@dataclass(frozen=True, slots=True)
class NextGate:
    """Predicts layer `layer` from the input of the one before it."""

    layer: int
    router: torch.nn.Module
    ids_index: int
    ratio: torch.Tensor | None  # [H]
    cache: ExpertCache

    def __call__(self, hidden: torch.Tensor) -> None:
        """`hidden` [T, H]: what the experts of layer - 1 have just read."""
        if hidden.shape[0] > MOST_TOKENS:
            return
        guess = hidden if self.ratio is None else hidden * self.ratio
        ids: torch.Tensor = self.router(guess)[self.ids_index]
        wanted = [int(expert) for expert in experts_in_rank_order(ids)]
        self.cache.prefetch(self.layer, wanted, EXPERTS_PER_LAYER)


def next_gates(
    model: PreTrainedModel, topology: Topology, cache: ExpertCache
) -> list[NextGate | None]:
    """For each experts module, what to ask after it; None where the next one cannot be guessed."""
    gates: list[NextGate | None] = []
    for layer, (here, there) in enumerate(
        zip(topology.routers, topology.routers[1:], strict=False), start=1
    ):
        if here is None or there is None:
            gates.append(None)
            continue
        router = model.get_submodule(there.path)
        ratio = _norm_ratio(model, here, there)
        gates.append(NextGate(layer, router, there.ids_index, ratio, cache))
    return [*gates, None]


def _norm_ratio(
    model: PreTrainedModel, here: RouterPlace, there: RouterPlace
) -> torch.Tensor | None:
    """weight(next norm) / weight(this norm), where a zero leaves the number as it is."""
    if here.norm_path is None or there.norm_path is None:
        return None
    old = model.get_submodule(here.norm_path).weight
    new = model.get_submodule(there.norm_path).weight
    assert isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
    return torch.where(old == 0, torch.ones_like(old), new / old).detach()
