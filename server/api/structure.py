"""What an answer must look like, in the words of several servers, as one grammar."""

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi.concurrency import run_in_threadpool
from pydantic import WithJsonSchema
from pydantic_core import PydanticCustomError

from moestro.engine import GrammarRefused, GrammarSpec
from moestro.server.contract import UNSUPPORTED, Worker

from .values import refuse_surrogates

MAX_CHOICES = 1000

Structure = tuple[str, GrammarSpec]  # the field that asked for it, and what


def _schema_of(name: str, value: object) -> GrammarSpec:
    """A schema as an object, or as its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _wrong(name, "is no JSON") from None
    if not isinstance(value, dict | bool):
        raise _wrong(name, "must be a JSON schema")
    return GrammarSpec.of_schema(value)


def _regex_of(name: str, value: object) -> GrammarSpec:
    if not isinstance(value, str):
        raise _wrong(name, "must be a regular expression")
    return GrammarSpec("regex", refuse_surrogates(value))


def _choices_of(name: str, value: object) -> GrammarSpec:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES:
        raise _wrong(name, f"must be a list of 1 to {MAX_CHOICES} strings")
    if not all(isinstance(one, str) and one for one in value):
        raise _wrong(name, "must hold strings that are not empty")
    return GrammarSpec.of_choices([refuse_surrogates(one) for one in value])


def _object_of(name: str, value: object) -> GrammarSpec:
    if value is not True:
        raise _wrong(name, "must be true or false")
    return GrammarSpec("json_object")


def _response_format(name: str, value: object) -> GrammarSpec | None:
    """OpenAI's; json_object may bring a schema, as llama-server has it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("text", "json_object", "json_schema"):
        raise _wrong(name, "must be an object with type text, json_object or json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        return GrammarSpec("json_object") if schema is None else _schema_of(name, schema)
    wrapped = value.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else value.get("schema")
    if schema is None:
        raise _wrong(name, "needs json_schema.schema")
    return _schema_of(name, schema)


def _structured_outputs(name: str, value: object) -> GrammarSpec | None:
    """vLLM's: one of several kinds."""
    given = {key: one for key, one in value.items() if one} if isinstance(value, dict) else None
    if given is None or len(given) > 1:
        raise _wrong(name, "must be an object with one kind")
    for kind, told in given.items():
        if kind not in _KINDS:
            raise PydanticCustomError(
                UNSUPPORTED, "{param}: this kind is not supported", {"param": name}
            )
        return _KINDS[kind](name, told)
    return None


_Reader = Callable[[str, object], GrammarSpec | None]
_KINDS: dict[str, _Reader] = {
    "json": _schema_of,
    "regex": _regex_of,
    "choice": _choices_of,
    "json_object": _object_of,
}
STRUCTURES: dict[str, _Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema_of,
    "guided_json_object": _object_of,
    "guided_regex": _regex_of,
    "guided_choice": _choices_of,
    "json_schema": _schema_of,
    "regex": _regex_of,
}

AnyJson = Annotated[Any, WithJsonSchema({"description": "See the README's table of fields."})]


def structure_of(fields: dict[str, Any]) -> Structure | None:
    """`fields`: by the names above. Raises PydanticCustomError; GrammarRefused for what is no JSON.

    Empty values are none: a web UI sends them without thought.
    """
    found: list[Structure] = []
    for name, reader in STRUCTURES.items():
        value = fields.get(name)
        if value in (None, False, "", [], {}):
            continue
        spec = reader(name, value)
        if spec is not None:
            found.append((name, spec))
    if len(found) > 1:
        raise _wrong(found[1][0], f"not together with {found[0][0]}")
    return found[0] if found else None


async def check_structure(structure: Structure | None, worker: Worker) -> GrammarSpec | None:
    """Compiled ahead of the engine, in a thread. GrammarRefused names the field."""
    if structure is None:
        return None
    param, spec = structure
    try:
        await run_in_threadpool(worker.tokenizer.grammars.compile, spec)
    except GrammarRefused as error:
        raise GrammarRefused(str(error), param) from error
    return spec


def _wrong(param: str, words: str) -> PydanticCustomError:
    return PydanticCustomError("structure", "{param}: {words}", {"param": param, "words": words})
