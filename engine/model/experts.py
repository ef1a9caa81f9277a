"""The experts of one layer, plugged into stock transformers as the implementation "moestro".

route -> lease -> compute -> combine: the model's own router has chosen; the cache lends each
distinct expert as it arrives; every result goes to its own (token, k) place; the weighted sum over
k is taken once, in fixed order, in fp32. So neither arrival order nor cache size can change a bit.

Shape letters: T tokens, k experts per token, E experts, H width of the experts' input and output.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise, zip_longest
from typing import Any, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moestro.cache import ComputeBelow, ExpertCache, Phase, Routed
from moestro.engine.facts import Indices
from moestro.engine.kernels import Activation, Groups, combine
from moestro.engine.kernels import Routed as RoutedRows
from moestro.engine.selection import StepRows

from .expert_math import ExpertMath

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


@contextmanager
def experts_aside(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no expert of `model` is asked for: their sum is the input times a number.

    It depends on every chosen expert's number and share, so that no other choice gives the same.
    """
    bound = [
        (each, each.__dict__["moestro_experts"])
        for each in model.modules()
        if "moestro_experts" in each.__dict__
    ]
    try:
        for module, _ in bound:
            bind(module, _aside)
        yield
    finally:
        for module, function in bound:
            bind(module, function)


def _aside(
    module: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    known: torch.Tensor = (ids + 1) / int(module.num_experts)  # type: ignore[arg-type]
    factor = (known * weights).sum(dim=1, keepdim=True)
    return hidden * factor.to(hidden.dtype)


class StepPhase:
    """Which phase the step in progress is in; set by the runner, read by every layer."""

    def __init__(self) -> None:
        self.phase = Phase.DECODE
        self.rows: StepRows | None = None  # of sequences that want experts of their own
        self.indices = Indices()


FEW_TOKENS = 16
"""Up to so many, experts that are here together share every operation but the products.

With more tokens the rows of one expert fill the caches, and are better taken through it alone.
"""


Views = dict[str, torch.Tensor]  # of one expert's weights, where they lie
Meanwhile = Callable[[], None]
"""Called once or not at all: while an expert is being read, and before any is computed."""


class Ahead(Protocol):
    """Prefetch for the layer after this one."""

    def before(self, layer: int, hidden: torch.Tensor) -> None:
        """`hidden` [T, H] is what the experts of `layer` will read."""

    def after(self, layer: int, asked: Collection[int]) -> None:
        """These were its experts; their work is queued, or done."""


class OffloadedExperts:
    """The experts of one layer, wherever their weights are."""

    def __init__(
        self,
        layer: int,
        cache: ExpertCache,
        step: StepPhase,
        math: ExpertMath,
        output_scale: float = 1.0,
        ahead: Ahead | None = None,
        compute_below: ComputeBelow | None = None,
        activation: Activation | None = None,
    ) -> None:
        """`activation`: the library's, where it has the module's; see `ExpertMath.together`."""
        self.layer = layer
        self.cache = cache
        self.step = step
        self.math = math
        self.compute_below = compute_below  # who is computed where they lie, with few tokens
        self.output_scale = output_scale
        self.ahead = ahead
        self._activation = activation

    def __call__(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        meanwhile: Meanwhile | None = None,
    ) -> torch.Tensor:
        rows = self.step.rows
        if rows is None:
            return self._run(module, hidden, ids, weights, None, meanwhile)
        spread = rows.spread(self.layer, hidden, ids, weights)
        places = spread.ids.numel()
        energies = hidden.new_zeros(places, dtype=torch.float32) if rows.looks else None
        given = spread.rows(hidden)
        out = self._run(module, given, spread.ids, spread.weights, energies)
        if energies is not None:
            rows.look(self.layer, ids, energies)
        return spread.joined(out)

    def _run(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        energies: torch.Tensor | None,
        meanwhile: Meanwhile | None = None,
    ) -> torch.Tensor:
        """`energies` fp32 [T * k], zeros, gets the squared norms of activations where wanted."""
        tokens, k = ids.shape
        if self.math.tiled:
            return self._in_tiles(module, hidden, ids, weights, energies, meanwhile)
        run = self._few_tokens if tokens <= FEW_TOKENS else self._many_tokens
        results, asked = run(module, hidden, ids, weights, energies)
        if self.ahead is not None:
            self.ahead.after(self.layer, asked)
        if self.output_scale != 1.0:
            weights = weights * self.output_scale
        shares, results = weights.float(), results.float()
        if tokens == 1:
            return torch.mm(shares, results).to(hidden.dtype)
        combined = torch.bmm(shares[:, None], results.view(tokens, k, -1))  # [T, 1, H]
        return combined[:, 0].to(hidden.dtype)

    def _in_tiles(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        energies: torch.Tensor | None,
        meanwhile: Meanwhile | None,
    ) -> torch.Tensor:
        """On the CPU with the library's products: one call for all experts that are here."""
        (tokens, k), num_experts = ids.shape, int(module.num_experts)  # type: ignore[arg-type]
        few, hidden = tokens <= FEW_TOKENS, hidden.contiguous()
        shares = weights.float().contiguous()
        groups = self.math.groups(ids, shares, num_experts)
        results = self.math.results(tokens * k, hidden.shape[1], complete=groups.rows == tokens * k)
        experts = groups.experts if few else sorted(groups.experts)
        routed = self._told(tokens, groups, experts)
        here: Sequence[Views] | Mapping[int, Views] | None
        here = self.cache.resident(self.layer, experts, self.step.phase, routed)
        if here is None:
            here = self.cache.swept(self.layer, experts, self.step.phase)
        if here is not None:
            self._look_ahead(hidden)
            self.math.together(module, here, groups, hidden, results, self._activation, energies)
        else:
            below = self.compute_below if few else None
            event = (self.layer, experts, self.step.phase, routed, below)
            rest = hidden, results, self._activation, energies
            with self.cache.acquire(*event) as lease:
                self._look_ahead(hidden)
                if meanwhile is not None and lease.coming:
                    meanwhile()
                for group in lease.groups() if few else ([each] for each in lease):
                    if len(group) == groups.count:  # one call for all, and no lists of places
                        self.math.together(module, dict(group), groups, *rest)
                        continue
                    wanted = groups.by_expert()
                    rows = rows_of([wanted[expert] for expert, _ in group], k)
                    self.math.together(module, [views for _, views in group], rows, *rest)
        if self.ahead is not None:
            self.ahead.after(self.layer, experts)
        if self.output_scale != 1.0:
            shares = shares * self.output_scale
        return combine(shares, results)

    def _told(self, tokens: int, groups: Groups, experts: Sequence[int]) -> Routed | None:
        """As `_routed`, of `experts` in this order."""
        if self.step.phase is Phase.DECODE:
            return None
        wanted = groups.by_expert()
        return self._routed(tokens, (len(wanted[expert]) for expert in experts))

    def _few_tokens(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        energies: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Collection[int]]:
        """Decoding: experts that are here together run together; place by place [T*k, H]."""
        tokens, k = ids.shape
        num_experts: int = module.num_experts  # type: ignore[assignment]
        wanted = places_by_expert(*on_host(ids, weights, num_experts), num_experts)
        rows, results = self.math.codec.begin(hidden), None
        routed = self._routed(tokens, map(len, wanted.values()))
        event = (self.layer, list(wanted), self.step.phase, routed, self.compute_below)
        with self.cache.acquire(*event) as lease:
            self._look_ahead(hidden)
            for group in lease.groups():
                places = [wanted[expert] for expert, _ in group]
                flat = list(chain.from_iterable(places))
                own = None if energies is None else energies.new_empty(len(flat))
                group_of = [who for _, who in group]
                out = self._together(module, rows, hidden, k, places, group_of, own)
                if energies is not None and own is not None:
                    energies[self.step.indices.on(flat, out.device)] = own
                if flat == list(range(tokens * k)):
                    return out, wanted  # all at once and in order already
                if results is None:
                    results = hidden.new_zeros((tokens * k, hidden.shape[1]))
                results.index_copy_(0, self.step.indices.on(flat, out.device), out)
        if results is None:
            results = hidden.new_zeros((tokens * k, hidden.shape[1]))
        return results, wanted

    def _together(
        self,
        module: torch.nn.Module,
        rows: Any,
        hidden: torch.Tensor,
        k: int,
        places: Sequence[Sequence[int]],
        tensors: Sequence[dict[str, torch.Tensor]],
        energies: torch.Tensor | None,
    ) -> torch.Tensor:
        """The rows of all `places`, one below the other, each through its own expert."""
        experts = [self.math.open(each) for each in tensors]
        if len(hidden) == 1 and all(len(some) == 1 for some in places):
            return self.math.apart(module, rows, experts, energies)
        of_token = [place // k for some in places for place in some]
        below = accumulate((len(some) for some in places), initial=0)
        chosen = self.math.codec.take(rows, self.step.indices.on(of_token, hidden.device))
        return self.math.each(module, chosen, list(pairwise(below)), experts, energies)

    def _many_tokens(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        energies: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Collection[int]]:
        """Expert-major: the tokens of each expert are gathered once and computed together."""
        (tokens, k), num_experts = ids.shape, int(module.num_experts)  # type: ignore[arg-type]
        results = hidden.new_zeros((tokens * k, hidden.shape[1]))
        order, starts = sort_by_expert(ids, weights, num_experts)
        wanted = [expert for expert in range(num_experts) if starts[expert] < starts[expert + 1]]
        codec = self.math.codec
        rows = codec.begin(hidden)
        routed = self._routed(tokens, (to - since for since, to in pairwise(starts)))
        with self.cache.acquire(self.layer, wanted, self.step.phase, routed) as lease:
            self._look_ahead(hidden)
            for expert, tensors in lease:
                places = order[starts[expert] : starts[expert + 1]]
                chosen = codec.take(rows, places // k)
                own = None if energies is None else energies.new_empty(len(places))
                out = self.math.one(module, chosen, self.math.open(tensors), own)
                if energies is not None and own is not None:
                    energies[places] = own
                results.index_copy_(0, places, out)
        return results, wanted

    def _routed(self, tokens: int, counts: Iterable[int]) -> Routed | None:
        """What a prompt tells the cache about its answer; `counts` of none are left out."""
        if self.step.phase is Phase.DECODE:
            return None
        return Routed(tokens, tuple(count for count in counts if count))

    def _look_ahead(self, hidden: torch.Tensor) -> None:
        """Asks for the guess while reads are under way and before the experts are computed: on a

        device that runs behind, it has then come when the last of them is queued.
        """
        if self.ahead is not None:
            self.ahead.before(self.layer, hidden)


def rows_of(places: Sequence[Sequence[int]], k: int) -> RoutedRows:
    """Places t * k + j of each expert of a call, as the call wants them."""
    flat = list(chain.from_iterable(places))
    starts = list(accumulate(map(len, places), initial=0))
    return RoutedRows(starts, [place // k for place in flat], flat)


def on_host(
    ids: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[list[list[int]], list[list[float]]]:
    """`ids` and `weights` [T, k] as lists for `places_by_expert`.

    A device is waited for once: what has weight 0 is marked there by an id that is none.
    """
    if ids.device.type == "cpu":
        return ids.tolist(), weights.tolist()
    marked = mark(ids, weights, num_experts).tolist()
    return marked, [[1.0] * len(row) for row in marked]


def mark(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`ids`, with `num_experts` where the weight is 0."""
    return torch.where(weights == 0, num_experts, ids)


def places_by_expert(
    ids: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], num_experts: int
) -> dict[int, list[int]]:
    """Places t * k + j of each expert of `ids` [T][k]; what `sort_by_expert` leaves out is not in.

    Experts come in the order of their first place.
    """
    found: dict[int, list[int]] = {}
    place = 0
    for row, shares in zip(ids, weights, strict=True):
        for expert, share in zip(row, shares, strict=True):
            if share != 0 and expert < num_experts:
                found.setdefault(expert, []).append(place)
            place += 1
    return found


def sort_by_expert(
    ids: torch.Tensor, weights: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, list[int]]:
    """Places t * k + j of `ids` [T, k] grouped by expert; group e is [starts[e], starts[e + 1]).

    Ids from `num_experts` on ("contributes nothing") and places of weight 0 are in no group, so
    that no expert is loaded for nothing.
    """
    keyed = mark(ids, weights, num_experts).reshape(-1).clamp_(max=num_experts)
    ordered, order = keyed.sort(stable=True)
    experts = torch.arange(num_experts + 1, device=ids.device)
    return order, torch.searchsorted(ordered, experts).tolist()


def in_rank_order(ids: Sequence[Sequence[int]]) -> Iterable[int]:
    """Distinct experts of `ids` [T][any], first choices of all tokens before the second ones."""
    ranks = chain.from_iterable(zip_longest(*ids))
    return dict.fromkeys(each for each in ranks if each is not None)
