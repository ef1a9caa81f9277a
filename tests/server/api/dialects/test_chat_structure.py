"""Answers that are held to something: calls that must come, and every way to say a structure."""

import json
from typing import Any

import pytest

from chat_formats import written
from chat_kit import HERMES, HI, URL, WEATHER, added, ask, chatting, says, streamed, without_ids
from fake_engine import FakeWorker
from moestro.engine import GrammarRefused


@pytest.fixture
def worker() -> FakeWorker:
    return chatting(HERMES)


async def test_a_call_that_must_come_is_held_to_the_tools(client, worker):
    worker.script = says('[{"name": "weather", "arguments": {"city": "Bern"}}]', seed=2)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        body = await ask(client, tools=[WEATHER], tool_choice=choice)
        (message,) = (one["message"] for one in body["choices"])
        assert message["content"] is None
        (call,) = message["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
        assert body["choices"][0]["finish_reason"] == "tool_calls"
        total = added(await streamed(client, tools=[WEATHER], tool_choice=choice))
        assert without_ids(total["message"]) == without_ids(message)
    first, *_, last = worker.tokens.grammars.compiled
    assert json.loads(first.text)["maxItems"] == 16 and json.loads(last.text)["maxItems"] == 1
    held = json.loads(last.text)["items"]["anyOf"]
    assert held[0]["properties"]["name"] == {"const": "weather"}
    assert held[0]["properties"]["arguments"] == WEATHER["function"]["parameters"]
    assert worker.submitted[-1].params.grammar == last


async def test_definitions_of_tools_are_found_from_the_root(client, worker):
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/X"}},
            "$defs": {"X": {"type": kind}},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    await ask(client, tools=[tool("f", "string"), tool("g", "string")], tool_choice="required")
    schema = json.loads(worker.submitted[0].params.grammar.text)
    assert schema["$defs"] == {"X": {"type": "string"}}
    body = {
        "messages": HI,
        "tools": [tool("f", "string"), tool("g", "integer")],
        "tool_choice": "required",
    }
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_one_call_alone_where_parallel_ones_are_not_wanted(client, worker):
    calls = [{"function": {"name": "weather", "arguments": {"city": c}}} for c in ("Bern", "Basel")]
    worker.script = says(written("hermes", {"role": "assistant", "tool_calls": calls}))
    body = await ask(client, tools=[WEATHER], parallel_tool_calls=False)
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPENAI_S = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("response_format", {"type": "json_object"}, "json_object"),
        ("response_format", {"type": "json_object", "schema": SCHEMA}, "json_schema"),
        ("response_format", OPENAI_S, "json_schema"),
        ("guided_json", SCHEMA, "json_schema"),
        ("guided_json", json.dumps(SCHEMA), "json_schema"),
        ("json_schema", json.dumps(SCHEMA), "json_schema"),
        ("guided_json_object", True, "json_object"),
        ("guided_regex", "[ab]+", "regex"),
        ("regex", "[ab]+", "regex"),
        ("guided_choice", ["a", "b"], "choice"),
        ("structured_outputs", {"json": SCHEMA}, "json_schema"),
        ("structured_outputs", {"regex": "a", "json": None}, "regex"),
        ("structured_outputs", {"choice": ["a"]}, "choice"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("url", [URL, "/v1/completions"])
async def test_every_way_to_say_a_structure(client, worker, url, name, value, kind):
    body = {"messages": HI} if url == URL else {"prompt": "x"}
    response = await client.post(url, json={**body, name: value})
    assert response.status_code == 200, response.text
    spec = worker.submitted[0].params.grammar
    assert spec.kind == kind and worker.tokens.grammars.compiled == [spec]
    if kind == "json_schema":
        assert json.loads(spec.text) == SCHEMA


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 3}}),
        ("guided_json", "{"),
        ("guided_regex", 3),
        ("guided_choice", [1]),
        ("guided_choice", [""]),
        ("guided_json_object", "yes"),
        ("structured_outputs", {"json": SCHEMA, "regex": "a"}),
        ("structured_outputs", {"grammar": "a"}),
        ("structured_outputs", 3),
        ("guided_grammar", "root ::= a"),
        ("grammar", "root ::= a"),
        ("ebnf", "root ::= a"),
    ],
)
async def test_structures_that_are_wrong_name_their_field(client, worker, name, value):
    response = await client.post(URL, json={"messages": HI, name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name), response.text
    assert not worker.submitted


async def test_two_structures_or_one_beside_tools_are_refused(client):
    body = {"messages": HI, "guided_regex": "a", "response_format": {"type": "json_object"}}
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_regex")
    body = {"messages": HI, "guided_regex": "a", "tools": [WEATHER]}
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_regex")
    assert (await client.post(URL, json={**body, "tool_choice": "none"})).status_code == 200


async def test_a_grammar_that_is_refused_names_the_field_that_asked(client, worker):
    worker.tokens.grammars.refusal = GrammarRefused("impossible: nothing fits")
    response = await client.post(URL, json={"messages": HI, "guided_json": SCHEMA})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "guided_json")
    assert error["message"] == "impossible: nothing fits"


async def test_an_answer_that_is_held_is_content_even_for_models_that_think(client, worker):
    worker.script = says('{"a": 1}')
    body = await ask(client, response_format={"type": "json_object"})
    assert body["choices"][0]["message"]["content"] == '{"a": 1}'
    assert worker.submitted[0].params.skip_special_tokens
