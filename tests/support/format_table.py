"""The second table of engine/FAMILIES.md: source formats, and how far logits are from stock's."""

import re
from collections.abc import Mapping

from family_run import TOLERANCE
from format_run import SOURCES, Cell

Cells = Mapping[tuple[str, str], Cell]  # by format and model type
FAMILIES = tuple(dict.fromkeys(name for source in SOURCES.values() for name in source.families))
NONE = "–"
HEAD = f"""
## Formats

Every format of quantized files through the same path, on some of the types: the largest difference
of a logit from stock transformers on the decoded weights, in fp32. The first number is of experts
that are decoded; behind *kept* are experts kept in the files' own numbers (`--expert-format` as
named): through the engine in fp8, and in int4 and mxfp4, whose products round the activations,
through stock with the weights that are in the engine's tiles.

| format | {" | ".join(FAMILIES)} |
|{" --- |" * (1 + len(FAMILIES))}
"""
WRITTEN = re.compile(r"(\S+?)(?:, (\w+) kept (\S+))?")
SLACK = 10  # how much larger than written a difference may be, on another CPU


def formats_text(cells: Cells) -> str:
    rows = []
    for name, source in SOURCES.items():
        found = [cells.get((name, family)) for family in FAMILIES]
        texts = [NONE if cell is None else cell_text(cell, source.kept) for cell in found]
        rows.append(f"| {name} | {' | '.join(texts)} |\n")
    return HEAD + "".join(rows)


def cell_text(cell: Cell, kept: str) -> str:
    text = _number(cell.decoded)
    return text if cell.kept is None else f"{text}, {kept} kept {_number(cell.kept)}"


def _number(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def read_formats(text: str) -> dict[tuple[str, str], Cell]:
    """Cells as committed in `text`, the whole page."""
    found = {}
    for line in text.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name not in SOURCES or len(cells) != len(FAMILIES):
            continue
        for family, cell in zip(FAMILIES, cells, strict=True):
            parts = WRITTEN.fullmatch(cell)
            if cell != NONE and parts is not None:
                kept = None if parts[3] is None else float(parts[3])
                found[name, family] = Cell(float(parts[1]), kept)
    return found


def agrees(found: Cell, written: Cell | None) -> bool:
    """Whether the same was compared, and no difference is much larger than written."""
    if written is None or (found.kept is None) is not (written.kept is None):
        return False
    pairs = [(found.decoded, written.decoded), (found.kept or 0.0, written.kept or 0.0)]
    return all(now <= max(SLACK * before, TOLERANCE / SLACK) for now, before in pairs)
