"""The guess: asked of the next layer's router, read ahead, and held against what was asked for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from manual_reader import ManualReader
from moestro.cache import ExpertCache, Phase, plan_slots
from moestro.engine import RecallStats
from moestro.engine.model.experts import StepPhase, in_rank_order
from moestro.engine.model.prefetch import MOST_TOKENS, LastRead, NextGate, Prefetch
from moestro.engine.model.regret import MEASURING_STEPS, WINDOW_STEPS, Regret, State
from tiny_packs import build_tiny, tiny_spec

ROW = torch.zeros(1, 4)


class Router(torch.nn.Module):
    """Names the experts it was told, whatever it is asked."""

    def __init__(self, *experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.inputs: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.inputs.append(hidden)
        ids = torch.tensor([self.experts] * hidden.shape[0])
        return torch.ones(ids.shape), ids


class Rig:
    """Three layers; the guess for layer 1 is 3, 4, 5; nothing is known of layer 2."""

    def __init__(self, cache: ExpertCache, reader: ManualReader, experts_per_layer: int) -> None:
        self.cache, self.reader = cache, reader
        self.step = StepPhase()
        self.router = Router(3, 4, 5)
        self.regret = Regret(0.0, cache.stats)
        self.now_s = self.worked_s = 0.0
        gates = [NextGate(self.router, 1, None, None, {}, 8), None, None]
        self.prefetch = Prefetch(
            gates, cache, self.step, experts_per_layer, self.regret, lambda: self.now_s, self.work
        )

    def work(self) -> float:
        """Every look at the clock finds it a quarter of a second on."""
        self.worked_s += 0.25
        return self.worked_s

    def run(self, *asked: list[int], hidden: torch.Tensor = ROW) -> None:
        """One step, whose layers ask for these; each takes a quarter of a second."""
        for layer, experts in enumerate(asked):
            self.prefetch.before(layer, hidden)
            with self.cache.acquire(layer, experts, self.step.phase) as lease:
                for _ in lease:
                    pass
            self.now_s += 0.25
            self.prefetch.after(layer, experts)
            self.reader.finish_all()
        self.cache.check()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[[int], Rig]]:
    spec = tiny_spec(6, 6, 6)
    pack = build_tiny(tmp_path / "tiny.pack", spec)

    def make(experts_per_layer: int) -> Rig:
        reader = ManualReader(pack)
        plan = plan_slots(12 * spec.slot_bytes, spec, 1)
        return Rig(ExpertCache(pack, plan, reader=reader), reader, experts_per_layer)

    yield make
    pack.close()


Make = Callable[[int], Rig]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_so_many_of_a_guess_are_read_ahead(rig: Make, most: int) -> None:
    made = rig(most)
    made.run([0], [3, 4], [0])
    stats = made.cache.stats()
    assert stats.prefetch_loads == most
    assert stats.prefetches_used == min(most, 2)


def test_recall_is_of_the_whole_guess_and_of_what_is_worth_a_read(rig: Make) -> None:
    made = rig(2)
    made.run([0], [1, 4, 5], [0])  # guess 3, 4, 5: fetch 3 and 4
    made.run([0], [1, 2], [0])  # guess 3, 4, 5: all are here
    nothing = RecallStats(guessed=0, right=0, asked=0, chosen=0, chosen_right=0)
    found = RecallStats(guessed=6, right=2, asked=5, chosen=2, chosen_right=1)
    assert made.prefetch.stats().layers == (nothing, found, nothing)


def test_prompts_are_not_counted(rig: Make) -> None:
    made = rig(1)
    made.step.phase = Phase.PREFILL
    made.run([0], [3], [0])
    assert made.cache.stats().prefetches_used == 1
    assert made.prefetch.stats().layers[1].guessed == 0


def test_many_tokens_ask_for_everything_anyway(rig: Make) -> None:
    made = rig(1)
    made.run([0], [3], [0], hidden=torch.zeros(MOST_TOKENS + 1, 4))
    assert not made.router.inputs


def test_a_sweep_needs_no_guess(rig: Make) -> None:
    made = rig(1)
    made.cache._sweeps.going = True
    made.prefetch.before(0, ROW)
    assert not made.router.inputs


def test_a_guess_that_a_failed_step_left_is_forgotten(rig: Make) -> None:
    made = rig(1)
    made.prefetch.before(0, ROW)
    made.prefetch.after(0, [0])  # and layer 1 never asks
    made.reader.finish_all()
    made.run([0], [3], [0])
    assert made.prefetch.stats().layers[0].guessed == 0
    assert made.prefetch.stats().layers[1].guessed == 3


def test_the_input_is_rescaled_by_the_norms() -> None:
    router = Router(0)
    gate = NextGate(router, 1, torch.tensor([2.0, 1.0, 0.5, 1.0]), None, {}, 8)
    assert gate(torch.ones(1, 4)).tolist() == [[0]]
    assert router.inputs[0].tolist() == [[2.0, 1.0, 0.5, 1.0]]


def test_the_first_choices_of_all_tokens_come_first() -> None:
    class Two(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.tensor([[1, 2], [3, 1]]),)

    ids = NextGate(Two(), 0, None, None, {}, 8)(torch.ones(2, 4))
    assert list(in_rank_order(ids.tolist())) == [1, 3, 2]


def test_a_layer_is_timed_without_the_stalls(rig: Make) -> None:
    made = rig(1)
    for _ in range(MEASURING_STEPS):
        made.run([0], [1], [2])
    assert made.regret.layer_s == pytest.approx(0.25)
    assert made.regret.state is State.WATCHED


def test_guessing_costs_what_the_work_clock_says(rig: Make) -> None:
    made = rig(1)
    for _ in range(MEASURING_STEPS + WINDOW_STEPS):
        made.run([0], [1], [2])
    assert made.prefetch.stats().cost_s == pytest.approx(
        WINDOW_STEPS * 2 * 0.25
    )  # asking and reading


def test_while_it_is_paused_nobody_is_asked(rig: Make) -> None:
    made = rig(1)
    made.regret.read_s = 1.0
    for _ in range(MEASURING_STEPS):
        made.run([0], [1], [2])
    assert made.regret.state is State.PAUSED
    asked, guessed = len(made.router.inputs), made.prefetch.stats().layers[1].guessed
    made.run([0], [1], [2])
    assert len(made.router.inputs) == asked
    assert made.prefetch.stats().layers[1].guessed == guessed
    assert not made.prefetch.stats().on


def test_a_router_that_reads_something_else_is_asked_with_that() -> None:
    """As on the residual: the guess is made of what the router before it read, not the experts."""
    first, router = torch.nn.Linear(4, 4), torch.nn.Linear(4, 8, bias=False)
    gate = NextGate(Best(router), 0, None, LastRead(first), {}, 8)
    residual = torch.randn(1, 3, 4)
    first(residual)
    assert gate(torch.randn(3, 2)).tolist() == router(residual[0]).topk(2).indices.tolist()


class Best(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(rows).topk(2).indices,)
