"""All experts of a layer in the order in which its router would choose them, where it can be asked.

Shape letters: n rows, H width, k experts per token, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Ranks = tuple[torch.Tensor, torch.Tensor]  # ids and weights [n, E], the largest first
Ranking = Callable[[torch.Tensor], Ranks]  # of rows [n, H] that the router and its experts read

APART = 1e-3  # how far ratios of weights may be from those of the router's own choice


class RouterRanking:
    """The stock router, told that a token has E experts."""

    def __init__(
        self, router: Any, ids_index: int, weights_index: int, constants: Mapping[str, torch.Tensor]
    ) -> None:
        """What it returns are tuples; `constants` it is given beside the rows."""
        self._router, self._constants = router, constants
        self._ids_index, self._weights_index = ids_index, weights_index

    def __call__(self, rows: torch.Tensor, k: int | None = None) -> Ranks:
        """Row by row on a CPU, so that none is rounded by its company. `k`: so many instead."""
        count = len(self._router.weight) if k is None else k
        blocks = [rows]
        if rows.device.type == "cpu":
            blocks = [rows[at : at + 1] for at in range(len(rows))]
        with _told(self._router, count):
            told = [self._ask(block) for block in blocks]
        ids, weights = (
            torch.cat([each[index] for each in told])
            for index in (self._ids_index, self._weights_index)
        )
        return ids, weights

    def _ask(self, rows: torch.Tensor) -> Any:
        return type(self._router).forward(self._router, rows, **self._constants)


@contextmanager
def _told(router: Any, count: int) -> Iterator[None]:
    own = router.top_k
    router.top_k = count
    try:
        yield
    finally:
        router.top_k = own


def ranking_of(
    router: torch.nn.Module, ids_index: int, constants: Mapping[str, torch.Tensor], num_experts: int
) -> RouterRanking | None:
    """None where `router` gives no such order of all experts, with weights in proportion."""
    weight, k = getattr(router, "weight", None), getattr(router, "top_k", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(k, int) or weight.dim() != 2:
        return None
    if len(weight) != num_experts or k >= num_experts:
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((4, weight.shape[1]), generator=generator).to(weight)
    rows /= weight.norm(dim=1).mean().clamp_min(1e-6)  # logits about as far apart as 1: all count
    try:
        told = type(router).forward(router, rows, **constants)
        places = [place for place, each in enumerate(told) if _is_share(each, told[ids_index])]
        if len(places) != 1:
            return None
        found = RouterRanking(router, ids_index, places[0], constants)
        own, whole = (found(rows, k), found(rows))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    return found if _agree(own, whole) else None


def _is_share(each: object, ids: torch.Tensor) -> bool:
    return isinstance(each, torch.Tensor) and each.is_floating_point() and each.shape == ids.shape


def _agree(own: Ranks, whole: Ranks) -> bool:
    """The order is one of all experts, falls, and begins with the router's own choice."""
    (ids, weights), (all_ids, all_weights) = own, whole
    k, count = ids.shape[1], all_ids.shape[1]
    every = torch.arange(count, device=ids.device).expand_as(all_ids)
    if all_ids.shape != all_weights.shape or not torch.equal(all_ids.sort(dim=1).values, every):
        return False
    if not torch.equal(all_ids[:, :k], ids) or bool((all_weights.diff(dim=1) > 0).any()):
        return False
    parts, same = (
        each.float() / each.float().sum(dim=1, keepdim=True)
        for each in (weights, all_weights[:, :k])
    )
    return bool((parts - same).abs().max() <= APART)
