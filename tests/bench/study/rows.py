"""Which rows and cells the study has, in the order in which they are run. Knows no model.

The routers' rows wait for the best split, accuracy and recovery for the best three rows: they are
decided by what the records say at 75 %.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .cells import ACCURACY, QUALITY, SPEED, Cell

SHARES = (0.75, 0.625, 0.5)
SPLITS = ("coactivation", "kmeans", "importance", "contiguous", "random")
ROUTERS = ("norm", "moefication", "prior")  # beside ridge, which every split is measured with
TASKS = ("arc_easy", "hellaswag", "piqa")
COMPARED_SHARE = 0.75  # where the best are chosen
BEST_ROWS = 3
WINDOW_TOKENS = 512  # of a held-out window, and of one that is calibrated on


@dataclass(frozen=True, slots=True)
class Geometry:
    """`active` experts of `experts`, each of 32 neurons, beside `shared` neurons of 1,536."""

    experts: int
    shared: int
    active: int


GEOMETRIES = {0.75: Geometry(24, 768, 12), 0.625: Geometry(24, 768, 6), 0.5: Geometry(36, 384, 12)}

Loss = Callable[[Cell], float | None]  # mean log-perplexity of a quality cell; None: not run


def experts_cell(split: str, router: str, active: float) -> Cell:
    return Cell(QUALITY, "experts", split, router, active)


def split_cells() -> list[Cell]:
    return [experts_cell(split, "ridge", share) for share in SHARES for split in SPLITS]


def best_split(loss: Loss) -> str | None:
    """By ridge routers; None until every split is measured."""
    found = {split: loss(experts_cell(split, "ridge", COMPARED_SHARE)) for split in SPLITS}
    known = {split: value for split, value in found.items() if value is not None}
    return min(known, key=known.__getitem__) if len(known) == len(SPLITS) else None


def router_cells(loss: Loss) -> list[Cell]:
    split = best_split(loss)
    if split is None:
        return []
    return [experts_cell(split, router, share) for share in SHARES for router in ROUTERS]


def best_rows(loss: Loss) -> list[Cell]:
    """The best three at 75 %, best first; none until splits and routers are measured."""
    routers = [cell for cell in router_cells(loss) if cell.active == COMPARED_SHARE]
    splits = [cell for cell in split_cells() if cell.active == COMPARED_SHARE]
    found = {cell: loss(cell) for cell in [*splits, *routers]}
    known = {cell: value for cell, value in found.items() if value is not None}
    if not routers or len(known) < len(found):
        return []
    return sorted(known, key=known.__getitem__)[:BEST_ROWS]


def fixed_cells() -> Iterator[Cell]:
    """Quality of the rows that no router is fitted for."""
    yield Cell(QUALITY, "dense")
    for method in ("oracle", "griffin"):
        for share in SHARES:
            yield Cell(QUALITY, method, active=share)
    for share in (0.75, 0.625):
        yield Cell(QUALITY, "demo", "coactivation", "ridge", share)


def speed_cells() -> Iterator[Cell]:
    """Of the geometries: a token's speed does not depend on how neurons were split or routed to."""
    for share in (1.0, *SHARES):
        yield Cell(SPEED, "dense" if share == 1 else "experts", active=share)


def accuracy_cells(loss: Loss) -> Iterator[Cell]:
    rows = [
        Cell(QUALITY, "dense"),
        Cell(QUALITY, "demo", "coactivation", "ridge", COMPARED_SHARE),
        *best_rows(loss)[:1],
        Cell(QUALITY, "griffin", active=COMPARED_SHARE),
        Cell(QUALITY, "oracle", active=COMPARED_SHARE),
        *best_rows(loss)[1:],
    ]
    for row in rows:
        for task in TASKS:
            yield Cell(ACCURACY, row.method, row.split, row.router, row.active, task)


def recovery_cells(loss: Loss) -> Iterator[Cell]:
    for row in best_rows(loss):
        yield Cell(QUALITY, "recovered", row.split, row.router, row.active)


def all_cells(loss: Loss) -> list[Cell]:
    """As far as they are decided. What is compared at 75 % first, what is trained for minutes last.

    A stable sort by share, so that a run that is stopped early has whole columns.
    """
    quality = [*fixed_cells(), *split_cells(), *router_cells(loss)]
    here = [cell for cell in quality if cell.active >= COMPARED_SHARE]
    rest = [cell for cell in quality if cell.active < COMPARED_SHARE]
    return [
        *here,
        *speed_cells(),
        *accuracy_cells(loss),
        *sorted(rest, key=lambda cell: -cell.active),
        *recovery_cells(loss),
    ]


def quick_cells() -> list[Cell]:
    """A sample of every kind, enough for what must hold (quick.py)."""
    demo = Cell(QUALITY, "demo", "coactivation", "ridge", COMPARED_SHARE)
    return [
        Cell(QUALITY, "dense"),
        Cell(QUALITY, "oracle", active=COMPARED_SHARE),
        Cell(QUALITY, "griffin", active=COMPARED_SHARE),
        demo,
        experts_cell("coactivation", "ridge", COMPARED_SHARE),
        experts_cell("random", "ridge", COMPARED_SHARE),
        experts_cell("coactivation", "norm", COMPARED_SHARE),
        Cell(SPEED, "experts", active=COMPARED_SHARE),
        *(Cell(ACCURACY, "dense", task=task) for task in TASKS),
        *(Cell(ACCURACY, "demo", demo.split, demo.router, demo.active, task) for task in TASKS),
    ]
