"""What `--quick` measures, and what must hold of it whatever the machine."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from moestro.factorize import apply_plan, perplexity
from moestro.factorize.methods import load_dense

from .cells import QUALITY, Cell
from .rows import COMPARED_SHARE, experts_cell
from .simulate import Experts, Sections, Simulation
from .sources import HELD_OUT, Scope, Sources, ignore

QUICK = Scope(
    windows=1,
    calibration_tokens=4096,
    router_steps=60,
    questions={"arc_easy": 20, "hellaswag": 20, "piqa": 20},
)
SAME = 1e-3  # relative, of perplexities that are one in exact arithmetic

DENSE = Cell(QUALITY, "dense")
ORACLE = Cell(QUALITY, "oracle", active=COMPARED_SHARE)
DEMO = Cell(QUALITY, "demo", "coactivation", "ridge", COMPARED_SHARE)
RIDGE = experts_cell("coactivation", "ridge", COMPARED_SHARE)
BETTER = (  # the first one predicts better than the second
    (DENSE, ORACLE),
    (ORACLE, RIDGE),
    (DEMO, RIDGE),
    (ORACLE, DEMO),
)


def broken_promises(losses: Mapping[Cell, float]) -> Iterator[str]:
    """In words, each order that does not hold; `losses` by cell, nats per token."""
    for better, worse in BETTER:
        if not losses[better] < losses[worse]:
            yield (
                f"{better.name} should predict better than {worse.name}:"
                f" {losses[better]:.4f} and {losses[worse]:.4f} nats per token"
            )


def same_as_served(sources: Sources, scratch: Path, cell: Cell = RIDGE) -> Iterator[str]:
    """The plan of `cell` against the folder that is served, by stock transformers, on one window.

    With all experts it is the dense model, with the plan's number what the simulation computes.
    """
    plan = sources.plan(cell.split, cell.router, cell.active)
    model, options = scratch / "served", plan.facts.options
    apply_plan(plan, sources.dense, model, ignore)
    text, tokens = sources.texts / "heldout" / f"{HELD_OUT[0]}.txt", sources.scope.window_tokens
    dense = load_dense(sources.dense)
    for count, choice in ((options.experts, None), (options.top_k, Experts(plan, options.top_k))):
        served = perplexity(model, text, tokens, ignore, count, tokens).value
        wanted = _perplexity(Simulation(dense, choice), sources)
        if not math.isclose(served, wanted, rel_tol=SAME):
            yield (
                f"served with {count} of {options.experts} experts the perplexity is {served:.4f}"
                f" instead of {wanted:.4f}"
            )


def _perplexity(simulation: Simulation, sources: Sources) -> float:

    ids = sources.windows[0, 0]
    logits = simulation.logits(simulation.hidden(ids, Sections.halves(len(ids)))[:-1])
    return math.exp(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
