"""Frozen dataclasses read from JSON: every field there, none else, each of its own type.

JSON that parses can still say anything. Knows no file; who reads one adds its name to the error.
"""

import math
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


def read_fields(kind: type[_Kind], given: object, positive: Collection[str] = ()) -> _Kind:
    """A `kind` from a JSON object; its fields are str, int and float, those of `positive` above 0.

    Raises ValueError that names the field.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{_shown(given)} is not an object")  # a file's fault
    facts: Any = kind
    wanted: dict[str, Any] = {field.name: field.type for field in fields(facts)}
    for name in [*wanted, *given]:
        if name not in given:
            raise ValueError(f"{name} is missing")
        if name not in wanted:
            raise ValueError(f"{name!r} is no field of it")
        _check(name, given[name], wanted[name], least=0 if name in positive else None)
    return kind(**given)


def _check(name: str, value: object, wanted: type, least: int | None) -> None:
    accepted = (int, float) if wanted is float else (wanted,)
    if type(value) not in accepted:  # a bool is no number here
        raise ValueError(f"{name} is {_shown(value)}, not {_WORDS[wanted]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, not a finite number")
    if least is not None and isinstance(value, int | float) and value <= least:
        raise ValueError(f"{name} is {value}, not above {least}")


_WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number"}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
