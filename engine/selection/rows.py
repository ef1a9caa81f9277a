"""What the rows of one pass have to do with their sequences' choice of experts and neurons.

Rows of a prompt that asks for it are looked at: each routed expert's share of the squared norms of
the activations, and that of each block of neurons where all tokens run the same ones. Rows of a
sequence whose prompt has chosen are routed again, among the experts that it keeps, and computed
with the neurons that it keeps. Rows of all others are left alone, to the bit.

Shape letters: T rows of a pass, n some of them, k experts per token, E experts, L layers, H width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moestro.engine.facts import index_on

from .ranking import Ranking

LOOK_ROWS = 128
"""Rows whose neurons are looked at together: their activations are in memory twice."""

Copy = Callable[[torch.Tensor], torch.Tensor]
"""Rows [n, H] -> [n, H]: what a layer gives with the kept neurons alone."""


class PromptShares:
    """Sums over a prompt's tokens; they add up over its chunks."""

    def __init__(self, num_experts: Sequence[int], device: torch.device) -> None:
        """`num_experts` (or blocks of neurons) of each layer."""
        self.tokens = 0
        self._sums = [
            torch.zeros(count + 1, dtype=torch.float64, device=device) for count in num_experts
        ]

    def add(self, layer: int, ids: torch.Tensor, energies: torch.Tensor) -> None:
        """`ids` and `energies` [n, k]: squared norms of the activations of each token's experts.

        A token counts 1 in all. Ids of no expert, and tokens without any activation, count 0.
        """
        sums, exact = self._sums[layer], energies.double()
        parts = exact / exact.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        sums.index_add_(0, ids.reshape(-1).clamp(max=len(sums) - 1), parts.reshape(-1))

    def add_all(self, layer: int, energies: torch.Tensor) -> None:
        """`energies` [n, E]: squared norms of each token's activations, by its blocks of neurons.

        A token counts 1 in all, so these are GRIFFIN's sums (arXiv 2404.01365) of a block.
        """
        exact = energies.double()
        tiniest = torch.finfo(torch.float64).tiny
        self._sums[layer][:-1] += (exact / exact.sum(dim=1, keepdim=True).clamp_min(tiniest)).sum(0)

    def shares(self) -> list[list[float]]:
        """[L][E]: the mean over the prompt's tokens."""
        return [(sums[:-1] / max(1, self.tokens)).tolist() for sums in self._sums]


class KeptNeurons(NamedTuple):
    """Of each layer that has neurons to choose from."""

    blocks: tuple[tuple[int, ...], ...] = ()  # in their own order
    copies: tuple[Copy | None, ...] = ()  # None: all blocks are kept, and none is copied
    size_bytes: int = 0  # of all copies


class Kept:
    """The experts and neurons that one sequence keeps."""

    def __init__(
        self,
        layers: Sequence[tuple[int, ...]],
        num_experts: Sequence[int],
        device: torch.device,
        neurons: KeptNeurons = KeptNeurons(),  # noqa: B008  # a value like any other
    ) -> None:
        """`layers`: experts of each, the most important first."""
        self.layers = tuple(layers)
        self.neurons = neurons
        self._rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.masks: list[torch.Tensor] = []  # bool [E + 1]; the last stands for ids of no expert
        for experts, count in zip(self.layers, num_experts, strict=True):
            mask = torch.zeros(count + 1, dtype=torch.bool, device=device)
            mask[index_on(experts, device)] = True
            self.masks.append(mask)

    def rows(
        self, layer: int, ids: torch.Tensor, weights: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every k of a layer's experts make a row of ids and one of weights, all `weight`.

        k and dtypes are those of `ids` and `weights` [T, k], the same at every call for a layer.
        The last row is filled up with the weight 0.
        """
        k = ids.shape[1]
        if (layer, k) not in self._rows:
            chosen = self.layers[layer]
            places = -(-len(chosen) // k) * k
            experts = [*chosen, *[0] * (places - len(chosen))]
            shares = [weight] * len(chosen) + [0.0] * (places - len(chosen))
            self._rows[layer, k] = (
                torch.tensor(experts, dtype=ids.dtype, device=ids.device).view(-1, k),
                torch.tensor(shares, dtype=weights.dtype, device=weights.device).view(-1, k),
            )
        return self._rows[layer, k]


@dataclass(frozen=True, slots=True)
class Spread:
    """A pass's rows as a layer's experts are given them: some stand there more than once."""

    ids: torch.Tensor  # [T + len(again), k]
    weights: torch.Tensor  # the same
    again: tuple[int, ...]  # the rows that those behind the first T repeat, with other experts

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T + len(again), H]"""
        if not self.again:
            return hidden
        return torch.cat([hidden, hidden.index_select(0, index_on(self.again, hidden.device))])

    def joined(self, out: torch.Tensor) -> torch.Tensor:
        """[T + len(again), H] -> [T, H]: added up in their order, whatever the company."""
        tokens = len(out) - len(self.again)
        for place, row in enumerate(self.again, tokens):
            out[row] += out[place]
        return out[:tokens]


class StepRows:
    """The rows of one pass, in packed order."""

    def __init__(
        self,
        tokens: int,
        prompts: Sequence[tuple[int, int, PromptShares]],
        kept: Mapping[int, Kept],
        kept_weights: Sequence[float] | None,
        rankings: Sequence[Ranking | None],
    ) -> None:
        """`tokens`: T. `prompts`: rows [start, end) to be looked at; `kept`: by row.

        `kept_weights`: every kept expert runs, with its layer's weight; None: the router chooses
        among them, where `rankings` has its order of all; else the kept ones of its own choice do.
        """
        self._tokens, self._prompts = tokens, prompts
        self._kept, self._weights = kept, kept_weights
        self._rankings = rankings
        self._owners: list[tuple[list[int], Kept]] = []  # of copies, with their rows
        if any(any(each.neurons.copies) for each in kept.values()):
            owners = {id(each): each for each in kept.values()}
            self._owners = [
                ([row for row, each in kept.items() if each is owner], owner)
                for owner in owners.values()
            ]

    @property
    def looks(self) -> bool:
        """The activations' squared norms are asked for."""
        return bool(self._prompts)

    def look(self, layer: int, ids: torch.Tensor, energies: torch.Tensor) -> None:
        """`ids` [T, k] as the router gave them; `energies` [at least T * k]."""
        k = ids.shape[1]
        for start, end, shares in self._prompts:
            shares.add(layer, ids[start:end], energies[start * k : end * k].view(-1, k))

    def look_at_neurons(
        self, layer: int, width: int, activations: Callable[[slice], torch.Tensor]
    ) -> None:
        """`activations` of rows of the pass: [n, neurons], of blocks of `width`.

        `layer` of those whose neurons can be chosen.
        """
        place = len(self._rankings) + layer  # behind the layers of experts
        for start, end, shares in self._prompts:
            for at in range(start, end, LOOK_ROWS):
                inner = activations(slice(at, min(end, at + LOOK_ROWS)))
                shares.add_all(place, inner.float().square().view(len(inner), -1, width).sum(2))

    def copies(self, layer: int) -> list[tuple[list[int], Copy]]:
        """Rows that are computed with a copy of some of the neurons; `layer` of those that have

        such. Answers to one prompt share theirs.
        """
        found = ((rows, owner.neurons.copies[layer]) for rows, owner in self._owners)
        return [(rows, copy) for rows, copy in found if copy is not None]

    def spread(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Spread:
        """What becomes of `ids` and `weights` [T, k], the router's choice for `hidden` [T, H]."""
        assert len(ids) == self._tokens, "a row of the experts is no token"
        if not self._kept:
            return Spread(ids, weights, ())
        if self._weights is not None:
            return self._all_kept(layer, ids, weights, self._weights[layer])
        rows = index_on(list(self._kept), ids.device)
        mask = torch.stack([kept.masks[layer] for kept in self._kept.values()])
        own_ids, own = ids.index_select(0, rows), weights.index_select(0, rows)
        ranking = self._rankings[layer]
        if ranking is None:
            return Spread(ids, weights.index_copy(0, rows, only_kept(own_ids, own, mask)), ())
        ranks = ranking(hidden.index_select(0, rows))
        own_ids, own = best_kept(own_ids, own, mask, ranks)
        return Spread(ids.index_copy(0, rows, own_ids), weights.index_copy(0, rows, own), ())

    def guesses(self, layer: int, guessed: Sequence[Sequence[int]]) -> list[list[int]]:
        """Experts of `layer` that each row will ask for, the likeliest first.

        `guessed` [T or more][k]: what its router said. A fixed set comes whole, what was said
        before the rest.
        """
        found = [list(row) for row in guessed[: self._tokens]]  # what stands there again, once
        for row, kept in self._kept.items():
            experts = kept.layers[layer]
            said = [] if self._weights is not None else [e for e in found[row] if e in experts]
            found[row] = list(dict.fromkeys([*said, *experts]))
        return found

    def _all_kept(
        self, layer: int, ids: torch.Tensor, weights: torch.Tensor, weight: float
    ) -> Spread:
        """Every k of a row's kept experts make one row; the first stays in its place."""
        found = [kept.rows(layer, ids, weights, weight) for kept in self._kept.values()]
        again = tuple(row for row, (own, _) in zip(self._kept, found, strict=True) for _ in own[1:])
        if self._tokens == 1:
            return Spread(*found[0], again)
        rows = index_on(list(self._kept), ids.device)
        whole = []
        for which, stock in enumerate((ids, weights)):
            parts = [each[which] for each in found]
            placed = stock.index_copy(0, rows, torch.cat([part[:1] for part in parts]))
            behind = [part[1:] for part in parts] if again else []
            whole.append(torch.cat([placed, *behind]))
        return Spread(whole[0], whole[1], again)


def only_kept(ids: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`weights` [n, k] of `ids` [n, k], 0 where `mask` [n, E + 1] has none of its experts.

    The others of a row are scaled, so that their sum stays; where none is left, the one of the
    largest weight is. Ids of no expert keep their weight.
    """
    none = mask.shape[1] - 1
    real = ids < none
    inside = mask.gather(1, ids.clamp(max=none)) & (weights != 0)
    best = torch.where(real, weights, -torch.inf).argmax(dim=1, keepdim=True)
    first = torch.zeros_like(real).scatter_(1, best, True)
    inside = torch.where(inside.any(dim=1, keepdim=True), inside, first)
    exact = weights.float()
    left = torch.where(inside, exact, 0.0)
    whole = torch.where(real, exact, 0.0).sum(dim=1, keepdim=True)
    sums = left.sum(dim=1, keepdim=True)
    factor = torch.where(sums == 0, 0.0, whole / torch.where(sums == 0, 1.0, sums))
    return torch.where(real, (left * factor).to(weights.dtype), weights)


def best_kept(
    ids: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, ranks: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids` and `weights` [n, k], or the k first experts of `ranks` that `mask` [n, E + 1] has.

    As if the others' logits were -inf, but that a row's weights keep their sum. A choice that the
    mask has whole stays as it is, to the bit.
    """
    k, (all_ids, all_weights) = ids.shape[1], ranks
    whole = mask.gather(1, ids).all(dim=1, keepdim=True)
    inside = mask.gather(1, all_ids)
    first = inside.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    found = all_ids.gather(1, first)
    shares = torch.where(inside, all_weights.float(), 0.0).gather(1, first)
    sums = shares.sum(dim=1, keepdim=True)
    factor = weights.float().sum(dim=1, keepdim=True) / torch.where(sums == 0, 1.0, sums)
    chosen = (shares * factor).to(weights.dtype)
    return torch.where(whole, ids, found.to(ids.dtype)), torch.where(whole, weights, chosen)
