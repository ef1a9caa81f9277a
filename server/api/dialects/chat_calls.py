"""tool_choice "required", or one function by name: the answer is held to a list of calls.

The list is JSON whatever the model would write by itself: `[{"name": ..., "arguments": {...}}]`.
"""

from typing import Any

from moestro.engine import BadParameter, GrammarSpec

from .chat_schema import ChatRequest, Json

MOST_CALLS = 16
_DEFINITIONS = ("$defs", "definitions")


def forced_calls(body: ChatRequest) -> tuple[str, GrammarSpec] | None:
    """None where the model may answer in words. Raises BadParameter, GrammarRefused."""
    if not body.must_call:
        return None
    tools = [
        tool["function"]
        for tool in body.tools
        if body.called_name in (None, tool["function"]["name"])
    ]
    one_alone = body.called_name is not None or body.parallel_tool_calls is False
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "maxItems": 1 if one_alone else MOST_CALLS,
        "items": {"anyOf": [_call_schema(function) for function in tools]},
    }
    for name in _DEFINITIONS:
        if shared := _shared(tools, name):
            schema[name] = shared
    return "tools", GrammarSpec.of_schema(schema)


def _call_schema(function: Json) -> Json:
    parameters = dict(function.get("parameters") or {"type": "object"})
    for name in _DEFINITIONS:
        parameters.pop(name, None)
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _shared(tools: list[Json], name: str) -> Json:
    """Definitions that references name from the root, where all schemas are now."""
    found: Json = {}
    for function in tools:
        for key, value in ((function.get("parameters") or {}).get(name) or {}).items():
            if found.setdefault(key, value) != value:
                raise BadParameter(
                    f"two tools define {key[:100]!r} in {name} differently: rename one", "tools"
                )
    return found
