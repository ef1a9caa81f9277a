"""Whether a JSON schema requires itself, so that no text that it allows can ever end.

A grammar library follows such a schema all the same, from one level to the next. Says so only
where it is sure: what it does not look at is taken to end.
"""

from typing import Any
from urllib.parse import unquote

MOST_VISITS = 100_000  # of parts of a schema; a larger one is taken to end


class _Undecided(Exception):
    pass


def is_endless(schema: Any) -> bool:
    search = _Search(schema)
    try:
        return not search.root_ends()
    except _Undecided:
        return False


class _Search:
    """The least set of references that end: each of them by those that do already."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._ending = set[str]()
        self._asked = {"#"}
        self._visits = 0

    def root_ends(self) -> bool:
        """Raises _Undecided."""
        known = -1
        while known < len(self._ending) + len(self._asked):
            known = len(self._ending) + len(self._asked)
            for reference in self._asked - self._ending:
                if self._ends(self._target(reference)):
                    self._ending.add(reference)
        return "#" in self._ending

    def _ends(self, schema: Any) -> bool:
        self._visits += 1
        if self._visits > MOST_VISITS:
            raise _Undecided
        if not isinstance(schema, dict) or "enum" in schema or "const" in schema:
            return True
        parts = [*_parts(schema, "allOf"), *_required(schema), *_least_items(schema)]
        choices = [_parts(schema, name) for name in ("anyOf", "oneOf") if _parts(schema, name)]
        return (
            self._reference_ends(schema.get("$ref"))
            and all(self._ends(part) for part in parts)
            and all(any(self._ends(part) for part in choice) for choice in choices)
        )

    def _reference_ends(self, reference: Any) -> bool:
        if not isinstance(reference, str):
            return True
        self._asked.add(reference)
        return reference in self._ending

    def _target(self, reference: str) -> Any:
        """True, which ends, for one that leads nowhere or out of the schema."""
        found = self._root
        start, *path = reference.split("/")
        for step in path:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                return True
        return found if start == "#" else True


def _parts(schema: dict[str, Any], name: str) -> list[Any]:
    held = schema.get(name)
    return held if isinstance(held, list) else []


def _required(schema: dict[str, Any]) -> list[Any]:
    """What an object cannot be without; nothing where it need not be an object."""
    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, dict):
        return []
    return [properties[name] for name in _parts(schema, "required") if name in properties]


def _least_items(schema: dict[str, Any]) -> list[Any]:
    least = schema.get("minItems")
    if schema.get("type") != "array" or not isinstance(least, int):
        return []
    first = _parts(schema, "prefixItems")
    return first[:least] + [schema.get("items", True)] * (least > len(first))
