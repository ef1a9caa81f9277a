"""The routes about the tokenizer, as lm-eval, vLLM's and llama-server's clients call them."""

import asyncio
import threading
from collections.abc import Sequence

import httpx
import pytest
from pydantic import ValidationError

from chat_formats import FORMATS
from fake_engine import FakeTokenizer, eventually
from moestro.engine import EngineState, TokenizerInfo
from moestro.server.api.dialects import tokenizer as routes

JSON = {"content-type": "application/json"}


class WithBos(FakeTokenizer):
    """Puts byte 1 before a text; it is special."""

    def encode(
        self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
    ) -> list[int]:
        return [1] * add_special_tokens + super().encode(text, most_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return super().decode([one for one in ids if one != 1 or not skip_special_tokens])


@pytest.fixture(autouse=True)
def _with_bos(worker):
    worker.tokens = WithBos()


def refusal_of(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 400
    error = response.json()["error"]
    return error["code"], error["param"]


async def test_the_way_of_lm_eval(client):
    info = await client.get("/tokenizer_info")
    assert info.status_code == 200
    assert info.json()["eos_token"] == "</s>"
    asked = {"prompt": "hé", "add_special_tokens": False}
    tokens = (await client.post("/tokenize", json=asked)).json()["tokens"]
    assert tokens == list("hé".encode())
    text = (await client.post("/detokenize", json={"tokens": tokens})).json()
    assert text == {"prompt": "hé", "content": "hé"}


async def test_the_answer_has_the_shape_of_vllm(client):
    response = await client.post("/tokenize", json={"model": "demo", "prompt": "hi"})
    assert response.json() == {
        "count": 3,
        "max_model_len": 64,
        "tokens": [1, 104, 105],
        "token_strs": None,
    }


@pytest.mark.parametrize("name", ["return_token_strs", "with_pieces"])
async def test_texts_of_tokens_are_given_when_asked_for(client, name):
    response = await client.post("/tokenize", json={"prompt": "hé", name: True})
    assert response.json()["token_strs"] == ["\x01", "h", "bytes:\\xc3", "bytes:\\xa9"]
    response = await client.post("/tokenize", json={"prompt": "hé", name: False})
    assert response.json()["token_strs"] is None


@pytest.mark.parametrize(
    ("fields", "has_bos"),
    [
        ({}, True),
        ({"add_special_tokens": None, "add_special": None}, True),
        ({"add_special": True}, True),
        ({"add_special": False}, False),
        ({"add_special_tokens": False}, False),
    ],
)
async def test_special_tokens_are_added_unless_refused(client, fields, has_bos):
    tokens = (await client.post("/tokenize", json={"content": "a"} | fields)).json()["tokens"]
    assert tokens == [1] * has_bos + [97]


async def test_a_text_may_be_longer_than_the_context_or_empty(client):
    assert (await client.post("/tokenize", json={"prompt": "x" * 999})).json()["count"] == 1000
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == [1]
    assert (await client.post("/detokenize", json={"tokens": []})).json()["prompt"] == ""


async def test_special_tokens_come_back_as_text(client):
    response = await client.post("/detokenize", json={"tokens": [1, 97]})
    assert response.json()["prompt"] == "\x01a"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "prompt"),
        ({"prompt": None}, "missing_required_parameter", "prompt"),
        ({"prompt": "a", "content": "a"}, "invalid_value", "content"),
        ({"prompt": ["a"]}, "invalid_value", "prompt"),
        ({"prompt": 5}, "invalid_value", "prompt"),
        ({"prompt": "a", "add_special_tokens": 1}, "invalid_value", "add_special_tokens"),
        (
            {"prompt": "a", "add_special": True, "add_special_tokens": True},
            "invalid_value",
            "add_special",
        ),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}], "prompt": "a"}, "invalid_value", "messages"),
        (
            {"messages": [{"role": "user", "content": "x"}], "prompt": "a"},
            "invalid_value",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "invalid_value",
            "messages",
        ),  # no template
        ({"messages": [{"role": "user", "content": "x"}], "tools": 3}, "invalid_value", "tools"),
    ],
)
async def test_what_cannot_be_encoded_is_named(client, body, code, param):
    assert refusal_of(await client.post("/tokenize", json=body)) == (code, param)


@pytest.mark.parametrize("name", ["prompt", "content"])
async def test_text_that_no_encoding_has(client, name):
    response = await client.post("/tokenize", content=rf'{{"{name}": "\ud800"}}', headers=JSON)
    assert refusal_of(response) == ("invalid_value", name)


async def test_a_long_text_is_refused(client, monkeypatch):
    monkeypatch.setattr(routes, "MOST_TEXT_BYTES", 8)
    assert (await client.post("/tokenize", json={"prompt": "é" * 4})).status_code == 200
    response = await client.post("/tokenize", json={"prompt": "é" * 4 + "x"})
    assert refusal_of(response) == ("invalid_value", "prompt")
    assert "the most is 8" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "tokens", [None, "a", [-1], [256], [97, 10**30], [True], ["97"], [1.0], [None]]
)
async def test_what_is_no_token_is_named(client, tokens):
    response = await client.post("/detokenize", json={"tokens": tokens})
    assert refusal_of(response) == ("invalid_value", "tokens")
    assert len(response.text) < 300


def test_a_list_of_errors_is_not_longer_than_the_body() -> None:
    with pytest.raises(ValidationError) as caught:
        routes.DetokenizeRequest.model_validate({"tokens": [-1] * 1000})
    assert caught.value.error_count() == 1


async def test_the_vocabulary_s_end_is_said(client):
    response = await client.post("/detokenize", json={"tokens": [256]})
    assert "0 to 255" in response.json()["error"]["message"]


async def test_tokens_are_bounded(client, monkeypatch):
    monkeypatch.setattr(routes, "MOST_IDS", 1)  # the model's context is longer
    assert (await client.post("/detokenize", json={"tokens": [97] * 64})).status_code == 200
    response = await client.post("/detokenize", json={"tokens": [97] * 65})
    assert refusal_of(response) == ("invalid_value", "tokens")
    assert "the most is 64" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "given"),
    [
        (None, None),
        ("{{ x }}", "{{ x }}"),
        ({"tool_use": "a", "default": "b"}, "b"),
        ({"rag": "a"}, None),
    ],
)
async def test_facts_of_the_tokenizer(client, worker, template, given):
    worker.tokens.info = TokenizerInfo("<s>", None, "<pad>", template)
    assert (await client.get("/tokenizer_info")).json() == {
        "bos_token": "<s>",
        "eos_token": None,
        "pad_token": "<pad>",
        "chat_template": given,
        "model_max_length": 64,
    }


CALLS = [
    ("GET", "/tokenizer_info", None),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [97]}),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
async def test_not_before_the_model_is_there(client, worker, method, path, body):
    worker.state = EngineState.LOADING
    response = await client.request(method, path, json=body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_loading"


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
async def test_a_key_is_needed(client_for, method, path, body):
    client = client_for(api_key="right")
    assert (await client.request(method, path, json=body)).status_code == 401
    headers = {"authorization": "Bearer right"}
    assert (await client.request(method, path, json=body, headers=headers)).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), CALLS[1:])
async def test_another_model_s_tokens_are_not_here(client, method, path, body):
    response = await client.request(method, path, json=body | {"model": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_one_text_at_a_time_and_none_on_the_event_loop(client, worker):
    go = threading.Event()

    class Held(FakeTokenizer):
        def encode(
            self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
        ) -> list[int]:
            assert go.wait(5)  # set by the event loop, which is free
            return super().encode(text)

    worker.tokens = Held()
    calls = [asyncio.create_task(client.post("/tokenize", json={"prompt": "x"})) for _ in range(3)]
    assert (await client.get("/health")).status_code == 200
    await eventually(lambda: routes.limiter().statistics().tasks_waiting == 2, 2)
    go.set()
    assert {(await call).status_code for call in calls} == {200}


async def test_a_chat_is_counted_as_it_would_be_asked(client, worker):
    worker.tokens.chat = FORMATS[0]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    asked = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert asked.status_code == 200, asked.text
    body = (await client.post("/tokenize", json={"messages": messages})).json()
    assert body["tokens"] == list(worker.submitted[0].ids)
    assert body["count"] == asked.json()["usage"]["prompt_tokens"]
    shorter = await client.post(
        "/tokenize", json={"messages": messages, "add_generation_prompt": False}
    )
    assert shorter.json()["count"] < body["count"]
