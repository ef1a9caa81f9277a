"""Cells of the study: their keys, what is run again, what a stop loses. No model is measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study.cells import QUALITY, Cell, RecordInvalid, Runner, Store
from study.rows import (
    ROUTERS,
    SHARES,
    SPLITS,
    accuracy_cells,
    all_cells,
    best_rows,
    best_split,
    experts_cell,
    recovery_cells,
)

CELLS = [Cell(QUALITY, "dense"), *(experts_cell("random", "ridge", share) for share in SHARES)]


class Fake:
    """Measures by a counter, on a clock that each measurement turns by a minute."""

    def __init__(self, folder: Path, **conditions: Any) -> None:
        self.measured: list[str] = []
        self.said: list[str] = []
        self.now_s = 0.0
        self.stop_at: str | None = None
        self.runner = Runner(
            Store(folder),
            lambda _: {"held_out_sha256": "ab"} | conditions,
            self.measure,
            lambda: {"cpu": "fake"},
            self.said.append,
            lambda: self.now_s,
        )

    def measure(self, cell: Cell) -> dict[str, Any]:
        if cell.name == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(cell.name)
        self.now_s += 60
        return {"losses": [[1.0, 2.0]], "number": len(self.measured)}


def run(fake: Fake, budget_s: float = 1e6, **arguments: Any) -> list[Cell]:
    return fake.runner.run(lambda: CELLS, budget_s, **arguments)


def test_each_cell_has_a_name_of_its_own() -> None:
    cells = all_cells(lambda cell: 1.0 + 0.01 * len(cell.name))
    assert len({cell.name for cell in cells}) == len(cells) > 50
    assert Cell(QUALITY, "dense", seed=2).name != Cell(QUALITY, "dense").name
    assert experts_cell("kmeans", "ridge", 0.625).name == "quality-experts-kmeans-ridge-62.5"


def test_a_finished_cell_is_not_run_again_unless_asked_for(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    assert run(fake) == [] and fake.measured == [cell.name for cell in CELLS]
    run(fake)
    assert len(fake.measured) == len(CELLS)
    run(fake, again=True)
    assert len(fake.measured) == 2 * len(CELLS)


def test_other_conditions_are_another_measurement(tmp_path: Path) -> None:
    run(Fake(tmp_path))
    other = Fake(tmp_path, windows=3)
    run(other)
    assert len(other.measured) == len(CELLS)
    record = other.runner.store.find(CELLS[0])
    assert record is not None and record.conditions["windows"] == 3


def test_a_stop_loses_the_running_cell_alone(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.stop_at = CELLS[2].name
    with pytest.raises(KeyboardInterrupt):
        run(fake)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(x.name for x in CELLS[:2])
    again = Fake(tmp_path)
    run(again)
    assert again.measured == [cell.name for cell in CELLS[2:]]


def test_no_cell_starts_that_the_time_does_not_reach(tmp_path: Path) -> None:
    """Two minutes are expected of the first, one of the others: as long as the first one took."""
    fake = Fake(tmp_path)
    assert run(fake, budget_s=200) == CELLS[3:]
    assert "4 cells to go, about 8 minutes" in fake.said[0]
    assert "3 cells to go, about 3 minutes" in fake.said[1]


def test_rows_that_wait_for_results_are_run_in_the_same_run(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    later = Cell(QUALITY, "oracle", active=0.75)

    def planned() -> Iterator[Cell]:
        yield from CELLS
        if fake.runner.store.find(CELLS[-1]) is not None:
            yield later

    fake.runner.run(planned, 1e6)
    assert fake.measured[-1] == later.name


@pytest.mark.parametrize("text", ["{", "[]", '{"cell": {"measure": 1}}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.path(CELLS[0]).write_text(text)
    for call in (lambda: store.find(CELLS[0]), store.all):
        with pytest.raises(RecordInvalid, match=r"quality-dense\.json is no record"):
            call()


def losses(known: dict[Cell, float]) -> Any:
    return known.get


def test_routers_wait_for_the_best_split_and_the_rest_for_the_best_rows() -> None:
    known = {experts_cell(split, "ridge", 0.75): 3.0 for split in SPLITS[1:]}
    assert best_split(losses(known)) is None
    known[experts_cell(SPLITS[0], "ridge", 0.75)] = 3.5
    known[experts_cell("random", "ridge", 0.75)] = 2.5
    assert best_split(losses(known)) == "random" and best_rows(losses(known)) == []
    assert experts_cell("random", "norm", 0.5) in all_cells(losses(known))
    known |= {experts_cell("random", router, 0.75): 2.0 + n for n, router in enumerate(ROUTERS)}
    best = best_rows(losses(known))
    assert [(cell.split, cell.router) for cell in best] == [
        ("random", ROUTERS[0]),
        ("random", "ridge"),
        ("kmeans", "ridge"),
    ]
    assert [cell.router for cell in recovery_cells(losses(known))] == [x.router for x in best]
    assert {x.method for x in accuracy_cells(losses(known))} == {
        *("dense", "oracle", "griffin", "demo", "experts")
    }
