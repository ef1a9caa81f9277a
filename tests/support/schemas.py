"""JSON schemas of the kinds that JSONSchemaBench collects: function calls, configuration files,
records, unions, recursion. A text that some of them allow always comes to an end.
"""

from typing import Any

Schema = dict[str, Any]


def closed(properties: dict[str, Any], *optional: str, **more: Any) -> Schema:
    """An object of these properties, all required but `optional` ones, and no others."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


def listed(items: Any, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


WORD: Schema = {"type": "string", "maxLength": 12}
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
NAME: Schema = {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,9}$"}

FUNCTION_CALLS: dict[str, Schema] = {
    "weather": closed({"city": WORD, "unit": {"enum": ["celsius", "fahrenheit"]}}, "unit"),
    "currency": closed({"amount": {"type": "number", "minimum": 0}, "to": {"enum": ["EUR", "¥"]}}),
    "search": closed({"query": TEXT, "limit": {"type": "integer", "minimum": 1, "maximum": 50}}),
    "mail": closed({"to": listed({"type": "string", "format": "email"}, minItems=1, maxItems=2)}),
    "calculate": closed({"left": NUMBER, "op": {"enum": ["+", "-", "*", "/"]}, "right": NUMBER}),
    "named_call": closed({"name": {"const": "play"}, "arguments": closed({"song": WORD})}),
    "one_of_two_tools": {
        "anyOf": [
            closed({"name": {"const": "on"}, "arguments": closed({"lamp": WHOLE})}),
            closed({"name": {"const": "off"}, "arguments": closed({})}),
        ]
    },
    "date_range": closed(
        {"from": {"type": "string", "format": "date"}, "to": {"type": "string", "format": "date"}}
    ),
    "several_calls": listed(closed({"tool": NAME, "times": {"enum": [1, 2]}}), maxItems=3),
    "answer_with_reason": closed({"reason": TEXT, "answer": {"enum": ["A", "B", "C", "D"]}}),
}

CONFIGURATIONS: dict[str, Schema] = {
    "service": closed({"host": {"type": "string", "format": "ipv4"}, "tls": FLAG, "name": NAME}),
    "port": closed({"port": {"type": "integer", "minimum": 1, "maximum": 65535}}),
    "levels": closed({"level": {"enum": ["debug", "info", "warn", None]}}),
    "container": closed(
        {"image": NAME, "args": listed(WORD, maxItems=2), "env": listed(closed({"name": NAME}))},
        *("args", "env"),
    ),
    "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 5}},
    "open_object": {"type": "object", "properties": {"id": WHOLE}, "required": ["id"]},
    "deep": closed({"a": closed({"b": closed({"c": closed({"d": closed({"e": FLAG})})})})}),
    "versions": closed({"version": {"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}\.\d{1,2}$"}}),
    "all_optional": closed({"a": FLAG, "b": WHOLE, "c": WORD}, "a", "b", "c"),
    "patterned_names": {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,4}$": WHOLE},
        "additionalProperties": False,
    },
    "keys_to_escape": closed({'a"b': FLAG, "c\\d": FLAG, "é\n": {"type": "null"}}),
    "empty_object": closed({}),
    "described": closed({"on": FLAG}, title="Switch", description='A "switch"\n', **{"$id": "x"}),
    "with_default": closed({"retries": {"type": "integer", "default": 3, "examples": [1]}}),
}

RECORDS: dict[str, Schema] = {
    "person": closed(
        {"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "born": FLAG}
    ),
    "nullable": closed({"nick": {"type": ["string", "null"], "maxLength": 4}}),
    "identified": closed({"id": {"type": "string", "format": "uuid"}}),
    "point": closed({"x": NUMBER, "y": NUMBER, "z": NUMBER}, "z"),
    "share": closed({"share": {"type": "number", "minimum": 0, "maximum": 1}}),
    "strictly_between": closed(
        {"n": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 12}}
    ),
    "fives": closed({"n": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500}}),
    "of_a_length": closed({"code": {"type": "string", "minLength": 3, "maxLength": 5}}),
    "hexadecimal": closed({"colour": {"type": "string", "pattern": "^#[0-9a-f]{6}$"}}),
    "tags": closed({"tags": listed({"enum": ["red", "green", "blü"]}, minItems=1, maxItems=4)}),
    "matrix": listed(listed(WHOLE, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "pair": {"type": "array", "prefixItems": [WORD, WHOLE], "items": False, "minItems": 2},
    "clock": closed({"at": {"type": "string", "format": "time"}}),
    "moment": closed({"at": {"type": "string", "format": "date-time"}}),
    "constants": closed({"kind": {"const": {"a": [1, None, "x"]}}, "n": {"const": 3.5}}),
    "survey": closed({f"q{n}": {"enum": ["yes", "no", "n/a"]} for n in range(12)}),
}

UNIONS: dict[str, Schema] = {
    "text_or_number": {"anyOf": [WORD, WHOLE]},
    "exclusive": {"oneOf": [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]},
    "tagged": {
        "oneOf": [
            closed({"shape": {"const": "circle"}, "radius": NUMBER}),
            closed({"shape": {"const": "square"}, "side": WHOLE}),
        ]
    },
    "all_of": {
        "allOf": [
            {"type": "object", "properties": {"a": WHOLE}, "required": ["a"]},
            {"properties": {"b": FLAG}, "required": ["b"]},
        ]
    },
    "of_types": {"type": ["integer", "boolean", "null"]},
    "mixed_enum": {"enum": ["one", 2, 3.5, True, None, ["x"], {"y": 0}]},
    "anything_listed": listed({}, maxItems=1),
    "shared": {
        "$defs": {"address": closed({"street": WORD, "zip": WHOLE})},
        **closed({"home": {"$ref": "#/$defs/address"}, "work": {"$ref": "#/$defs/address"}}),
    },
    "older_definitions": {
        "definitions": {"id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}},
        **listed({"$ref": "#/definitions/id"}, maxItems=2),
    },
    "tree": {
        "$defs": {
            "node": closed({"v": FLAG, "kids": listed({"$ref": "#/$defs/node"}, maxItems=2)})
        },
        "$ref": "#/$defs/node",
    },
    "linked_list": {
        "$defs": {
            "cell": closed({"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/cell"}]}})
        },
        "$ref": "#/$defs/cell",
    },
    "itself": closed({"child": {"$ref": "#"}}, "child"),
    "steps": closed(
        {"steps": listed(closed({"say": WORD, "out": WORD}), maxItems=2), "final_answer": WORD}
    ),
    "bare_text": {"type": "string", "minLength": 1},
    "bare_number": {"type": "number", "minimum": -2.5, "maximum": 7.25},
}

SCHEMAS: dict[str, Schema] = FUNCTION_CALLS | CONFIGURATIONS | RECORDS | UNIONS

# No text fits: what is said of it.
IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "nothing": (False, "some text fits"),
    "bounds": ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
    "lengths": ({"type": "string", "minLength": 4, "maxLength": 2}, "minLength"),
    "required_never": (
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        "'a' is unsatisfiable",
    ),
    "two_types": ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "nsatisfiable"),
    "requires_itself": (closed({"a": {"$ref": "#"}}), "requires itself"),
    "requires_each_other": (
        {
            "$defs": {
                "a": listed({"$ref": "#/$defs/b"}, minItems=1),
                "b": closed({"a/~": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}}),
            },
            "allOf": [{"$ref": "#/$defs/a"}],
        },
        "requires itself",
    ),
    "itself_alone": ({"$ref": "#"}, "requires itself"),
}
# Not kept to, so not taken: what is said of it.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "unique": (listed(WHOLE, uniqueItems=True), "uniqueItems"),
    "not": ({"not": {"type": "null"}}, "not"),
    "conditional": ({"type": "object", "if": {}, "then": {}}, "if"),
    "elsewhere": ({"$ref": "https://example.com/other.json"}, "example.com"),
    "look_ahead": ({"type": "string", "pattern": "^(?=a)b$"}, "look"),
    "no_type": ({"type": "word"}, "word"),
    "no_schema": (3, "is an object, or true"),
}
# Too much of it.
HUGE: dict[str, Any] = {
    "long": {"enum": [f"value {number}" for number in range(20_000)]},
    "wide": closed(
        {f"p{number}": WHOLE for number in range(1_000)}, *(f"p{n}" for n in range(1_000))
    ),
    "crossed": {
        "type": "object",
        "allOf": [
            {"anyOf": [{"required": [f"p{row}{choice}"]} for choice in range(4)]}
            for row in range(12)
        ],
    },
}
