"""The README's table of fields, printed from the tables that requests are checked by.

.venv/bin/python tests/support/field_table.py
"""

import json
from collections import defaultdict

from moestro.server.api import (
    ALIASES,
    NEUTRAL,
    NEUTRAL_ON_CHAT,
    NEUTRAL_ON_COMPLETIONS,
    STRUCTURES,
    WINDOWS,
)


def table() -> str:
    lines = ["| fields | what becomes of them |", "| --- | --- |"]
    for name, others in _by_value(ALIASES).items():
        lines.append(f"| {_names(others)} | the same as `{name}` |")
    lines.append(f"| {_names(list(STRUCTURES))} | what the answer must look like |")
    lines.append(
        f"| {_names(list(WINDOWS))} | 400 with a penalty, unless it means the whole text;"
        " else without effect |"
    )
    for where, neutral in (
        ("", NEUTRAL),
        (" on completions", NEUTRAL_ON_COMPLETIONS),
        (" on chat", NEUTRAL_ON_CHAT),
    ):
        grouped: dict[str, list[str]] = defaultdict(list)
        for name, values in neutral.items():
            grouped[_shown(values)].append(name)
        lines += [f"| {_names(names)}{where} | {shown} |" for shown, names in grouped.items()]
    return "\n".join(lines) + "\n"


def _shown(neutral: tuple[object, ...]) -> str:
    values = ["null", *(f"`{json.dumps(value)}`" for value in neutral)]
    return f"accepted as {', '.join(values)}; anything else is a 400"


def _by_value(aliases: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for alias, name in aliases.items():
        found[name].append(alias)
    return found


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print(table())  # noqa: T201
