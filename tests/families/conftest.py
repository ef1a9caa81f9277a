"""What the run found, row by row: compared with the committed table, or written into it."""

from collections.abc import Callable

import pytest

from family_run import Outcome
from family_table import TABLE, read_cells, read_table, write_tables
from format_run import Cell
from format_table import agrees

FOUND = pytest.StashKey[dict[str, Outcome]]()
CELLS = pytest.StashKey[dict[tuple[str, str], Cell]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help=f"write what is found into {TABLE.name}")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, Outcome], None]:
    """Note an outcome: written into the table where that was asked for, compared with it else."""
    found = request.config.stash.setdefault(FOUND, {})
    writing = request.config.getoption("--write", default=False)

    def note(kind: str, outcome: Outcome) -> None:
        found[kind] = outcome
        committed = read_table()
        if writing:
            write_tables({**committed, kind: outcome}, read_cells())
            return
        assert committed.get(kind) == outcome, (
            f"{kind}: {TABLE.name} says {committed.get(kind)}, found {outcome}; if that is right:"
            " make families ARGS=--write"
        )

    return note


@pytest.fixture
def record_format(request: pytest.FixtureRequest) -> Callable[[str, str, Cell], None]:
    """The same of a source format and a model type."""
    found = request.config.stash.setdefault(CELLS, {})
    writing = request.config.getoption("--write", default=False)

    def note(name: str, kind: str, cell: Cell) -> None:
        found[name, kind] = cell
        committed = read_cells()
        if writing:
            write_tables(read_table(), {**committed, (name, kind): cell})
            return
        written = committed.get((name, kind))
        assert agrees(cell, written), (
            f"{name}, {kind}: {TABLE.name} says {written}, found {cell}; if that is right:"
            " make families ARGS=--write"
        )

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = [outcome.result for outcome in config.stash.get(FOUND, {}).values()]
    if results:
        passed, refused = results.count("passed"), results.count("refused")
        terminalreporter.write_line(f"families: {passed} passed, {refused} refused")
    cells = config.stash.get(CELLS, {}).values()
    if cells:
        kept = sum(cell.kept is not None for cell in cells)
        terminalreporter.write_line(f"formats: {len(cells)} passed, {kept} of them kept too")
