"""Every format of quantized files: exact on some model types, decoded and kept as it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from family_table import read_cells
from format_run import SOURCES, Cell, cell_of
from format_table import agrees

pytestmark = pytest.mark.families

PAIRS = [(name, family) for name, source in SOURCES.items() for family in source.families]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_stock_logits_of_every_format(
    name: str, family: str, tmp_path: Path, record_format: Callable[[str, str, Cell], None]
) -> None:
    record_format(name, family, cell_of(SOURCES[name], family, tmp_path))


def test_the_table_has_every_format_and_says_what_is_kept() -> None:
    cells = read_cells()
    assert cells.keys() == set(PAIRS)
    for (name, _), cell in cells.items():
        assert (cell.kept is not None) is bool(SOURCES[name].kept), name


@pytest.mark.parametrize(
    ("found", "written", "same"),
    [
        (Cell(3e-6), Cell(3e-6), True),
        (Cell(9e-6), Cell(1e-7), True),  # another CPU's rounding
        (Cell(4e-5), Cell(3e-6), False),
        (Cell(3e-6), None, False),
        (Cell(3e-6, 0.0), Cell(3e-6), False),
        (Cell(3e-6), Cell(3e-6, 0.0), False),
        (Cell(3e-6, 5e-5), Cell(3e-6, 0.0), False),
    ],
)
def test_a_cell_is_held(found: Cell, written: Cell | None, same: bool) -> None:
    assert agrees(found, written) is same
