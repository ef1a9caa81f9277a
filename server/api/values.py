"""Values of request fields: what is taken, and as what. Shared by all APIs.

Neither true nor "3" is a number, 64.0 is 64, and nothing is infinite.
"""

import math
from typing import Annotated

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from moestro.engine import MOST_BIAS

MAX_STOPS = 64
MAX_STOP_CHARS = 1000
MAX_BIASES = 1024
MAX_STOP_IDS = 256


def refuse_surrogates(text: str) -> str:
    """Half of a UTF-16 pair is no text, and no tokenizer takes it."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PydanticCustomError("invalid_text", "has a lone surrogate") from None
    return text


def whole_number(value: object) -> object:
    """A number without a fraction, however it is written; null stays null."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise PydanticCustomError("whole_number", "must be a whole number")


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("number", "must be a number")
    try:
        number = float(value)
    except OverflowError:  # a whole number of any length is JSON
        number = math.inf
    if not math.isfinite(number):
        raise PydanticCustomError("finite_number", "must be a finite number")
    return number


def _stops(value: object) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(given, list) or not all(isinstance(stop, str) for stop in given):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    stops = [refuse_surrogates(stop) for stop in given if stop]  # an empty one is no stop
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError(
            "stop_count",
            "must be at most {count} strings of at most {chars} characters",
            {"count": MAX_STOPS, "chars": MAX_STOP_CHARS},
        )
    return tuple(stops)


def _stop_ids(value: object) -> tuple[int, ...]:
    given = [] if value is None else value
    if not isinstance(given, list) or len(given) > MAX_STOP_IDS:
        raise PydanticCustomError(
            "stop_ids", "must be a list of at most {most} token ids", {"most": MAX_STOP_IDS}
        )
    if not all(type(one) is int and one >= 0 for one in given):
        raise PydanticCustomError("stop_ids", "must hold whole numbers from 0 on")
    return tuple(given)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """{"50256": -100}, as OpenAI has it: JSON's keys are strings."""
    given = {} if value is None else value
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        raise PydanticCustomError(
            "bias_type", "must be an object of at most {most} numbers", {"most": MAX_BIASES}
        )
    return tuple((_token_id(key), _bias(bias)) for key, bias in given.items())


def _token_id(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10:
        return int(key)
    raise PydanticCustomError("bias_key", "has a key that is no token id: {key}", {"key": str(key)})


def _bias(value: object) -> float:
    number = _number(value)
    if isinstance(number, float) and abs(number) <= MOST_BIAS:
        return number
    raise PydanticCustomError(
        "bias_range", "must hold numbers between -{most} and {most}", {"most": int(MOST_BIAS)}
    )


def _of(kind: str, **limits: object) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind, **limits}, {"type": "null"}]})


Whole = Annotated[int, BeforeValidator(whole_number)]
Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Temperature = Annotated[Number, Field(ge=0, le=2)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**64)]
_TEXT = {"type": "string"}
Stops = Annotated[
    tuple[str, ...],
    PlainValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "maxItems": MAX_STOPS, "items": _TEXT},
                {"type": "null"},
            ]
        }
    ),
]
StopIds = Annotated[
    tuple[int, ...],
    PlainValidator(_stop_ids),
    _of("array", maxItems=MAX_STOP_IDS, items={"type": "integer", "minimum": 0}),
]
Biases = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_biases),
    _of("object", maxProperties=MAX_BIASES, additionalProperties={"type": "number"}),
]
