"""What the run found, row by row: compared with the committed table, or written into it."""

from collections.abc import Callable

import pytest

from family_run import Outcome
from family_table import TABLE, read_table, write_table

FOUND = pytest.StashKey[dict[str, Outcome]]()


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
            write_table({**committed, kind: outcome})
            return
        assert committed.get(kind) == outcome, (
            f"{kind}: {TABLE.name} says {committed.get(kind)}, found {outcome}; if that is right:"
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
