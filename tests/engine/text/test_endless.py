"""Schemas that require themselves, told from those that only may go on."""

from typing import Any

import pytest

from moestro.engine.text.endless import is_endless
from schemas import SCHEMAS, closed, listed

SELF = {"$ref": "#"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_text_can_be_written_for_ends(name: str) -> None:
    assert not is_endless(SCHEMAS[name])


@pytest.mark.parametrize(
    ("schema", "endless"),
    [
        (closed({"a": SELF}), True),
        (closed({"a": SELF}, "a"), False),
        ({"properties": {"a": SELF}, "required": ["a"]}, False),  # may be no object
        (listed(SELF, minItems=1), True),
        (listed(SELF), False),
        ({"type": "array", "prefixItems": [{}, SELF], "minItems": 2}, True),
        ({"type": "array", "prefixItems": [{}, SELF], "minItems": 1}, False),
        ({"type": "array", "prefixItems": [{}, {}], "items": SELF, "minItems": 2}, False),
        ({"anyOf": [SELF, {"type": "null"}]}, False),
        ({"oneOf": [SELF, closed({"a": SELF})]}, True),
        ({"allOf": [{}, SELF]}, True),
        ({"a~/b": [0, {"$ref": "#/a~0~1b/1"}], "$ref": "#/a~0~1b/1"}, True),
        ({"a~/b": [0, {"const": 1}], "$ref": "#/a~0~1b/1"}, False),
        ({"$ref": "#/nowhere"}, False),
        ({"$ref": "other.json#/a"}, False),
        ({"$ref": 3, "required": 1, "minItems": "x", "type": "object", "properties": []}, False),
        (True, False),
    ],
    ids=str,
)
def test_endless(schema: Any, endless: bool) -> None:
    assert is_endless(schema) == endless


def test_a_long_chain_is_followed_and_a_search_too_long_given_up() -> None:
    def chain(links: int) -> dict[str, Any]:
        steps = {f"d{n}": closed({"a": {"$ref": f"#/$defs/d{n + 1}"}}) for n in range(links)}
        return {"$defs": {**steps, f"d{links}": SELF}, "$ref": "#/$defs/d0"}

    assert is_endless(chain(50))
    assert not is_endless(chain(1_000)), "undecided, so it is left to the grammar"
