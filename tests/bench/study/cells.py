"""Cells of the study: what one is, where its record lies, and the loop that runs what is missing.

A record is a small JSON file named after its cell. It counts as finished only under the very
conditions that are asked for (texts, windows, seed, version of the measurement): anything else is
measured anew. Knows no model.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1  # of what is measured: a record of another one is not finished
QUALITY, ACCURACY, SPEED = "quality", "accuracy", "speed"
# Before any record says how long a measurement takes; one thread of a busy server.
EXPECTED_S = {QUALITY: 120.0, ACCURACY: 300.0, SPEED: 60.0}

Values = dict[str, Any]
Conditions = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement of one row. `active` is the share of FFN neurons that a token computes."""

    measure: str
    method: str  # dense, oracle, griffin, experts, demo, recovered
    split: str = ""
    router: str = ""
    active: float = 1.0
    task: str = ""  # of an accuracy
    seed: int = 0

    @property
    def name(self) -> str:
        share = "" if self.active == 1 else f"{100 * self.active:g}"
        parts = (self.measure, self.method, self.split, self.router, share, self.task)
        return "-".join(part for part in parts if part) + (f"-s{self.seed}" if self.seed else "")


@dataclass(frozen=True, slots=True)
class Record:
    cell: Cell
    conditions: dict[str, Any]
    machine: dict[str, Any]
    seconds: float
    values: Values


class RecordInvalid(Exception):
    """A file among the results is no record; the message names it."""


class Store:
    """Records in a folder, each there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def find(self, cell: Cell) -> Record | None:
        """Raises RecordInvalid where the file is none."""
        path = self.path(cell)
        if not path.is_file():
            return None
        try:
            said = json.loads(path.read_text("utf-8"))
            record = Record(**(said | {"cell": Cell(**said["cell"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise RecordInvalid(f"{path} is no record of the study: remove it ({error})") from error
        if record.cell != cell:
            raise RecordInvalid(f"{path} is the record of {record.cell.name}: remove it")
        return record

    def put(self, record: Record) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(record.cell)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
        aside.replace(path)

    def all(self) -> list[Record]:
        """By name."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                cell = Cell(**json.loads(path.read_text("utf-8"))["cell"])
            except (ValueError, TypeError, KeyError) as error:
                raise RecordInvalid(f"{path} is no record of the study: remove it") from error
            record = self.find(cell)
            if record is None:
                raise RecordInvalid(f"{path} is not named after its cell {cell.name}: remove it")
            found.append(record)
        return found


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs cells, one after the other, and says how far it is."""

    store: Store
    conditions: Callable[[Cell], Conditions]  # that a cell is measured under
    measure: Callable[[Cell], Values]
    machine: Callable[[], dict[str, Any]]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic

    def is_finished(self, cell: Cell) -> bool:
        record = self.store.find(cell)
        return record is not None and record.conditions == dict(self.conditions(cell))

    def run(
        self,
        planned: Callable[[], Iterable[Cell]],
        budget_s: float,
        *,
        again: bool = False,
        after_each: Callable[[], None] = lambda: None,
    ) -> list[Cell]:
        """Measures what `planned` names and is not finished; what `budget_s` left no time for.

        `planned` is asked again after each cell: later rows depend on the results of earlier ones.
        A stop loses the running cell alone.
        """
        began_s, done = self.clock(), set[Cell]()
        skipped: list[Cell] = []
        while True:
            waiting = [
                cell
                for cell in planned()
                if cell not in done
                and cell not in skipped
                and (again or not self.is_finished(cell))
            ]
            if not waiting:
                return skipped
            cell, left_s = waiting[0], budget_s - (self.clock() - began_s)
            if self.expected_s(cell) > left_s:
                skipped.append(cell)
                continue
            total_s = sum(self.expected_s(each) for each in waiting)
            self.say(f"{cell.name}: {len(waiting)} cells to go, about {total_s / 60:.0f} minutes")
            started_s = self.clock()
            values = self.measure(cell)
            took_s = round(self.clock() - started_s, 1)
            known = dict(self.conditions(cell))
            self.store.put(Record(cell, known, self.machine(), took_s, values))
            done.add(cell)
            after_each()

    def expected_s(self, cell: Cell) -> float:
        """By the records of the same kind; a recovery's is its own affair."""
        alike = [
            record.seconds
            for record in self.store.all()
            if _kind(record.cell) == _kind(cell) and record.seconds > 0
        ]
        if alike:
            return sum(alike) / len(alike)
        minutes = float(self.conditions(cell).get("recover_minutes", 0.0))
        return EXPECTED_S[cell.measure] + 60 * minutes


def _kind(cell: Cell) -> tuple[str, str, bool]:
    return cell.measure, cell.task, cell.method == "recovered"
