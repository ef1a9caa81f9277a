"""Guesses the next layer's experts while this one's results are put together.

The next layer's own router is asked, with this layer's input rescaled by the ratio of the two
norms' weights: both layers normalise nearly the same residual (next-gate prefetch; arXiv
2308.12066 and others). A guess may always be ignored; it never changes what is computed. Each
guess is held against what the layer then asks for, and all of them against their cost (regret.py).
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moestro.cache import ExpertCache, Phase
from moestro.engine.facts import HostCopy, PrefetchStats, RecallStats

from .experts import StepPhase, in_rank_order
from .regret import Regret
from .topology import RouterPlace, Topology

MOST_TOKENS = 32  # beyond, nearly all experts of a layer run and a guess says nothing


class LastRead:
    """Remembers what a router read last: the residual, or wider rows than its experts do."""

    def __init__(self, router: torch.nn.Module) -> None:
        self._seen = torch.empty(0)
        router.register_forward_pre_hook(self._note)

    @property
    def rows(self) -> torch.Tensor:
        """[T, H]"""
        return self._seen.reshape(-1, self._seen.shape[-1])

    def _note(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self._seen = given[0]


@dataclass(frozen=True, slots=True)
class NextGate:
    """Predicts a layer from the input of the one before it."""

    router: torch.nn.Module
    ids_index: int
    ratio: torch.Tensor | None  # [H]
    read: LastRead | None  # what the router before it read, where that is not what experts do
    constants: Mapping[str, torch.Tensor]  # that it is given, too
    num_experts: int  # a router may know others behind these, that are none to load

    def __call__(self, hidden: torch.Tensor) -> HostCopy:
        """`hidden` [T, H]: what the experts of the layer before read -> ids [T, k]."""
        seen = hidden if self.read is None else self.read.rows
        guess = seen if self.ratio is None else seen * self.ratio
        ids: torch.Tensor = self.router(guess, **self.constants)[self.ids_index]
        return HostCopy(ids)


@dataclass(slots=True)
class _Recall:
    """See RecallStats."""

    guessed: int = 0
    right: int = 0
    asked: int = 0
    chosen: int = 0
    chosen_right: int = 0


@dataclass(frozen=True, slots=True)
class _Guess:
    """Until its layer has asked."""

    layer: int
    experts: list[int]
    chosen: list[int]  # the best ones that the cache lacked: to be read ahead


class Prefetch:
    """One for all layers of a model: asks before a layer's experts are computed, and reads after.

    A device that runs behind the host has answered by then, and is not waited for.
    """

    def __init__(
        self,
        gates: Sequence[NextGate | None],
        cache: ExpertCache,
        step: StepPhase,
        experts_per_layer: int,
        regret: Regret,
        clock: Callable[[], float] = time.perf_counter,
        work_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`gates[i]` guesses layer i + 1. `experts_per_layer`: the most that one guess reads.

        `work_clock` times the guessing: whoever is let in by the system meanwhile is not its fault.
        """
        self.regret = regret
        self._gates = gates
        self._cache = cache
        self._step = step
        self._most = experts_per_layer
        self._clock = clock
        self._work_clock = work_clock
        self._recall = [_Recall() for _ in gates]
        self._asked: tuple[HostCopy, float] | None = None  # by `before`, and what that took
        self._guess: _Guess | None = None  # of the layer that runs next
        self._began_s: float | None = None  # when the first layer of this decode step was done
        self._stall_s = 0.0  # by then

    def before(self, layer: int, hidden: torch.Tensor) -> None:
        """`hidden` [T, H] is what the experts of `layer` read."""
        gate, self._asked = self._gates[layer], None
        if self._cache.sweeping:
            self.regret.swept()
            return  # the next layer is being read ahead already
        if gate is not None and self.regret.on and hidden.shape[0] <= MOST_TOKENS:
            began_s = self._work_clock()
            ids = gate(hidden)
            self._asked = ids, self._work_clock() - began_s

    def after(self, layer: int, asked: Collection[int]) -> None:
        """`asked` were the experts of `layer`."""
        decoding = self._step.phase is Phase.DECODE
        guess, self._guess = self._guess, None
        if decoding and guess is not None and guess.layer == layer:  # else a step had failed
            self._compare(guess, asked)
        if not decoding and self._cache.follow_prompt(layer, len(asked)):
            self.regret.swept()
        if decoding and layer == 0:
            self._note_begin()
        if self._asked is not None:
            (ids, took_s), self._asked = self._asked, None
            self._fetch(layer + 1, ids, took_s)
        if decoding and layer == len(self._gates) - 1:
            self._note_end()

    def stats(self) -> PrefetchStats:
        return PrefetchStats(
            on=self.regret.on,
            pauses=self.regret.pauses,
            gain_s=self.regret.gain_s,
            cost_s=self.regret.cost_s,
            layers=tuple(
                RecallStats(one.guessed, one.right, one.asked, one.chosen, one.chosen_right)
                for one in self._recall
            ),
        )

    def _fetch(self, layer: int, ids: HostCopy, took_s: float) -> None:
        began_s = self._work_clock()
        gate = self._gates[layer - 1]
        assert gate is not None
        guessed = ids.tolist()
        if self._step.rows is not None:
            guessed = self._step.rows.guesses(layer, guessed)
        experts = [each for each in in_rank_order(guessed) if each < gate.num_experts]
        chosen = self._cache.absent(layer, experts)[: self._most]
        if chosen:
            self._cache.prefetch(layer, experts, self._most)
        self._guess = _Guess(layer, experts, chosen)
        if self._step.phase is Phase.DECODE:
            self.regret.guessed(took_s + self._work_clock() - began_s)

    def _compare(self, guess: _Guess, asked: Collection[int]) -> None:
        wanted, recall = set(asked), self._recall[guess.layer]
        recall.guessed += len(guess.experts)
        recall.right += sum(expert in wanted for expert in guess.experts)
        recall.asked += len(asked)
        recall.chosen += len(guess.chosen)
        recall.chosen_right += sum(expert in wanted for expert in guess.chosen)

    def _note_begin(self) -> None:
        self._began_s = None
        if self.regret.measuring and not self._cache.sweeping:
            self._stall_s = self._cache.stats().decode_stall_s
            self._began_s = self._clock()

    def _note_end(self) -> None:
        if self._began_s is None:
            self.regret.step()
            return
        took_s = self._clock() - self._began_s
        took_s -= self._cache.stats().decode_stall_s - self._stall_s
        self._began_s = None
        self.regret.step(took_s / (len(self._gates) - 1))


def next_gates(model: PreTrainedModel, topology: Topology) -> list[NextGate | None]:
    """For each experts module, what to ask after it; None where the next one cannot be guessed."""
    gates: list[NextGate | None] = []
    follow = zip(topology.routers, topology.routers[1:], topology.experts_paths[1:], strict=False)
    for here, there, path in follow:
        if here is None or there is None or here.reads_as_experts != there.reads_as_experts:
            gates.append(None)
            continue
        read = None if here.reads_as_experts else LastRead(model.get_submodule(here.path))
        router = model.get_submodule(there.path)
        ratio = _norm_ratio(model, here, there)
        count = int(model.get_submodule(path).num_experts)  # type: ignore[arg-type]
        constants = there.given_too(model)
        gates.append(NextGate(router, there.ids_index, ratio, read, constants, count))
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
