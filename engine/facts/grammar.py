"""What the text of an answer must look like, as a value. Knows no library and no token."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import GrammarRefused

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """`text` is the JSON text of a schema or of a list of choices, a regular expression (as Rust
    writes it, of the whole answer), a grammar as llguidance's dialect of Lark; "" for json_object.
    """

    kind: GrammarKind
    text: str = ""

    @classmethod
    def of_schema(cls, schema: object) -> "GrammarSpec":
        """Properties are generated in the schema's order, so it is kept. Raises GrammarRefused."""
        return cls("json_schema", _json(schema))

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> "GrammarSpec":
        """The answer is one of them, as it stands."""
        return cls("choice", _json(list(choices)))


def _json(value: object) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarRefused(f"the grammar is no JSON: {error}") from error
