"""`make study`: splits, routers and recovery on the demo's dense model, in one table.

Finished cells are not run again; Ctrl-C loses the running one alone. The table and its plots are
written anew after every cell, from the records there are.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import report
import torch

from .cells import QUALITY, Cell, RecordInvalid, Runner, Store
from .figures import mean_loss
from .laboratory import Laboratory
from .quick import QUICK, broken_promises, same_as_served
from .rows import all_cells, quick_cells
from .sources import Scope, Sources
from .table import write_study

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results", HERE / "STUDY.md"
BUDGET_MINUTES = 120.0


def arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    folder = Path(os.environ.get("MOESTRO_STUDY_DIR", cache / "study"))
    parser = argparse.ArgumentParser(
        prog="make study", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--only", metavar="NAME", help="cells whose name has this in it")
    parser.add_argument("--again", action="store_true", help="measure finished cells, too")
    parser.add_argument("--list", action="store_true", help="say what is finished; measure nothing")
    parser.add_argument("--table", action="store_true", help="write STUDY.md; measure nothing")
    parser.add_argument(
        "--minutes", type=float, default=BUDGET_MINUTES, help="start no cell that takes longer"
    )
    parser.add_argument(
        "--recover-minutes",
        type=float,
        default=Scope().recover_minutes,
        help="of distillation, for each recovered row",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a sample in 8 minutes, elsewhere; fails if it is odd"
    )
    parser.add_argument("--folder", type=Path, default=folder, help="for texts and plans")
    parser.set_defaults(cache=cache)
    found = parser.parse_args()
    if min(found.minutes, found.recover_minutes) <= 0:
        parser.error("minutes are more than 0")
    return found


def loss_of(store: Store, cell: Cell) -> float | None:
    record = store.find(cell)
    return None if record is None else mean_loss(record.values["losses"])


def planned(store: Store, only: str | None) -> list[Cell]:
    cells = all_cells(lambda cell: loss_of(store, cell))
    return [cell for cell in cells if only is None or only in cell.name]


def listed(runner: Runner, cells: Iterable[Cell]) -> None:
    for cell in cells:
        state = "finished" if runner.is_finished(cell) else "not run"
        report.show(f"{state:8}  {runner.expected_s(cell):5.0f} s  {cell.name}")


def full(chosen: argparse.Namespace) -> int:
    store = Store(RESULTS)
    if chosen.table:
        write_study(store, PAGE, planned(store, None))
        return 0
    scope = Scope(recover_minutes=chosen.recover_minutes)
    laboratory = Laboratory(Sources(chosen.folder, chosen.cache, scope))
    runner = Runner(store, laboratory.conditions, laboratory.measure, report.machine, report.show)
    if chosen.list:
        listed(runner, planned(store, chosen.only))
        return 0
    if chosen.only is not None and not planned(store, chosen.only):
        report.show(f"study: no cell has {chosen.only!r} in its name; --list names those there are")
        return 2
    skipped = runner.run(
        lambda: planned(store, chosen.only),
        60 * chosen.minutes,
        again=chosen.again,
        after_each=lambda: write_study(store, PAGE, planned(store, None)),
    )
    write_study(store, PAGE, planned(store, None))
    for cell in skipped:
        report.show(f"not run, the time is over: {cell.name} ({runner.expected_s(cell):.0f} s)")
    return 0


def quick(chosen: argparse.Namespace) -> int:
    """Its records and its page lie in a folder that is removed; what it fetches stays."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch) / "results")
        sources = Sources(chosen.folder, chosen.cache, QUICK)
        laboratory = Laboratory(sources)
        runner = Runner(
            store, laboratory.conditions, laboratory.measure, report.machine, report.show
        )
        cells = quick_cells()
        runner.run(lambda: cells, float("inf"))
        page = Path(scratch) / "STUDY.md"
        write_study(store, page, cells)
        report.show(page.read_text("utf-8"))
        values = {cell: store.find(cell) for cell in cells if cell.measure == QUALITY}
        losses = {
            cell: mean_loss(record.values["losses"])
            for cell, record in values.items()
            if record is not None
        }
        broken = [*broken_promises(losses), *same_as_served(sources, Path(scratch))]
    for line in broken:
        report.show(f"study: {line}")
    report.show(f"study: {'what must hold, holds' if not broken else 'FAILED'}")
    return 1 if broken else 0


def main() -> int:
    torch.set_num_threads(1)
    chosen = arguments()
    try:
        return quick(chosen) if chosen.quick else full(chosen)
    except RecordInvalid as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        report.show("stopped; finished cells are kept")
        return 130


if __name__ == "__main__":
    sys.exit(main())
