"""The table of cards: `python -m cards [--write]` prints it, or writes deploy/CARDS.md."""

import sys
from pathlib import Path

from .table import CARDS_GIB, DISK_BYTES_PER_S, HOST_GIB, LINK_BYTES_PER_S, models, row

PLACE = Path(__file__).parents[3] / "deploy" / "CARDS.md"
HEAD = """# What a card would hold

Written by `make cards ARGS=--write`, from the published configs in `tests/bench/cards/configs` and
the plan that a start makes (`moestro plan org/name --device cuda --device-memory 12GiB`). **Not
measured on a GPU**: sizes are arithmetic; of a card's memory 1 GiB is taken to be the driver's and
the desktop's.

## Experts in the card's slots, percent, in native / int8 / nf4

Dense weights, 1 GiB of KV and a step's workspace are on the card, too. "–": they alone do not fit.
"""
MIDDLE = f"""
## Tokens per second that link and disk allow, one sequence, nf4

Bounds, not promises, for uniform routing: a link of {LINK_BYTES_PER_S / 1e9:g} GB/s (PCIe 4 x16),
a host of {HOST_GIB} GiB, a disk of {DISK_BYTES_PER_S / 1e9:g} GB/s for what the host cannot hold.
How fast a card computes is not in them. "no bound": every expert is on the card.
"""


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    cards = " | ".join(f"{gib} GiB" for gib in CARDS_GIB)
    lines = " --- |" * len(CARDS_GIB)
    first = [
        f"| model | 10^9 | layers x experts, per token | {cards} |",
        f"| --- | --- | --- |{lines}",
    ]
    second = [f"| model | 10^9 | {cards} |", f"| --- | --- |{lines}"]
    for model in models():
        print(model.name, file=sys.stderr, flush=True)
        above, below = row(model)
        first.append(above)
        second.append(below)
    text = "\n".join([HEAD, *first, MIDDLE, *second, ""])
    if arguments:
        PLACE.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
