"""JSON that parses is not yet what was asked for."""

from dataclasses import dataclass

import pytest

from moestro.cache import read_fields


@dataclass(frozen=True, slots=True)
class Facts:
    name: str
    count: int
    factor: float


GOOD: dict[str, object] = {"name": "x", "count": 3, "factor": 2.5}


def test_what_has_the_types_is_read() -> None:
    assert read_fields(Facts, GOOD, ("count", "factor")) == Facts("x", 3, 2.5)
    assert read_fields(Facts, GOOD | {"factor": 2}).factor == 2, "JSON writes 2.0 as it likes"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], r"\[\] is not an object"),
        (None, "None is not an object"),
        ({"name": "x"}, "count is missing"),
        (GOOD | {"more": 1}, "'more' is no field"),
        (GOOD | {"factor": "zz"}, "factor is 'zz', not a number"),
        (GOOD | {"factor": 0}, "factor is 0, not above 0"),
        (GOOD | {"factor": -0.5}, "factor is -0.5, not above 0"),
        (GOOD | {"factor": float("nan")}, "factor is nan, not a finite number"),
        (GOOD | {"factor": float("inf")}, "factor is inf, not a finite number"),
        (GOOD | {"factor": True}, "factor is True, not a number"),
        (GOOD | {"count": 3.0}, "count is 3.0, not a whole number"),
        (GOOD | {"count": None}, "count is None, not a whole number"),
        (GOOD | {"count": 0}, "count is 0, not above 0"),
        (GOOD | {"name": ["x" * 99]}, "name is .{41}, not text"),
    ],
)
def test_the_field_at_fault_is_named(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_fields(Facts, given, ("count", "factor"))
    assert "\n" not in str(caught.value)
