"""engine/FAMILIES.md: what the engine does with each model type, as a table that a test holds."""

from pathlib import Path

from family_names import BROKEN, KNOWN
from family_registry import LEFT_OUT
from family_run import Outcome
from format_run import Cell
from format_table import Cells, formats_text, read_formats

TABLE = Path(__file__).parents[2] / "engine" / "FAMILIES.md"
COLUMNS = ("model type", "class", "result", "lane", "reason")
HEAD = f"""# Model types

What moestro does with every language model type with experts in transformers. `make families` holds
this table: a tiny random model of each type goes through the whole path and must give the logits of
stock transformers, or be refused. *Lane* is how it runs, where the engine tells.

| {" | ".join(COLUMNS)} |
|{" --- |" * len(COLUMNS)}
"""


def page_text(outcomes: dict[str, Outcome], cells: Cells) -> str:
    return table_text(outcomes) + formats_text(cells)


def table_text(outcomes: dict[str, Outcome]) -> str:
    rows = [
        f"| {kind} | {name} | {outcome.result} | {outcome.lane} | {outcome.reason} |"
        for kind, name in KNOWN.items()
        if (outcome := outcomes.get(kind)) is not None
    ]
    broken = [f"* {kind} fails: {why}." for kind, why in BROKEN.items()]
    left_out = [f"* {kind} is not checked: it {why}." for kind, why in LEFT_OUT.items()]
    results = [outcome.result for outcome in outcomes.values()]
    counts = f"{results.count('passed')} passed, {results.count('refused')} refused."
    return HEAD + "\n".join([*rows, "", counts, "", *broken, *left_out, ""])


def read_table() -> dict[str, Outcome]:
    """Outcomes by model type as committed; empty where there is no table."""
    if not TABLE.exists():
        return {}
    found = {}
    for line in TABLE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(COLUMNS) and cells[0] in KNOWN:
            found[cells[0]] = Outcome(*cells[2:])
    return found


def read_cells() -> dict[tuple[str, str], Cell]:
    """Cells by format and model type as committed; empty where there is no table."""
    return read_formats(TABLE.read_text("utf-8")) if TABLE.exists() else {}


def write_tables(outcomes: dict[str, Outcome], cells: Cells) -> None:
    TABLE.write_text(page_text(outcomes, cells), "utf-8")
