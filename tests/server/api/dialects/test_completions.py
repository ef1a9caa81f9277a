"""The completions and models endpoints, against a fake engine."""

import json
import logging
from typing import Any

import pytest

from fake_engine import FakeWorker, script_of
from moestro.engine import (
    BadParameter,
    EngineFailed,
    EngineState,
    FinishReason,
    QueueFull,
    SamplingParams,
    TokenEvent,
)

URL = "/v1/completions"


async def test_whole_answer_is_openai_s_object(client):
    response = await client.post(URL, json={"model": "demo", "prompt": "Gravity is"})
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "demo",
        "choices": [{"index": 0, "text": " a force.", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
    }


async def test_defaults_are_openai_s(client, worker):
    await client.post(URL, json={"prompt": "x"})
    assert worker.submitted[0].params == SamplingParams(max_tokens=16, temperature=1.0)


async def test_null_is_a_default_everywhere(client, worker):
    fields = (
        "model max_tokens temperature top_p top_k seed stop ignore_eos stream stream_options user "
        "n best_of echo logprobs suffix presence_penalty frequency_penalty logit_bias"
    )
    response = await client.post(URL, json={"prompt": "x"} | dict.fromkeys(fields.split()))
    assert response.status_code == 200
    assert worker.submitted[0].params == SamplingParams(max_tokens=16)


async def test_neutral_values_and_unknown_fields_are_accepted(client):
    body = {
        "prompt": "x",
        "n": 1,
        "best_of": 1,
        "echo": False,
        "suffix": "",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "no_such_field": {"a": [1]},
    }
    assert (await client.post(URL, json=body)).status_code == 200


async def test_parameters_reach_the_engine(client, worker):
    body = {
        "prompt": [1, 2, 3],
        "max_tokens": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "seed": -4,
        "stop": ["a", "b"],
        "ignore_eos": True,
    }
    await client.post(URL, json=body)
    assert worker.submitted[0].ids == (1, 2, 3)
    assert worker.submitted[0].params == SamplingParams(
        max_tokens=3, temperature=0, top_p=0.5, top_k=7, seed=-4, stop=("a", "b"), ignore_eos=True
    )


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
async def test_one_prompt_has_four_forms(client, worker, prompt):
    await client.post(URL, json={"prompt": prompt})
    assert worker.submitted[0].ids == (97, 98)


BAD_PROMPTS: list[Any] = ["", [], [[]], [""], None, 3, {}, [1, "a"], [-1], [1.5], [True], ["a", 1]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("prompt", value) for value in BAD_PROMPTS),
        ("prompt", [999]),
        ("prompt", ["a"] * 129),
        *(("max_tokens", value) for value in (-2, True, "3", 1.5)),
        *(("min_tokens", value) for value in (-1, 17, 0.5)),
        *(("temperature", value) for value in (-1, 2.1, True, "1")),
        *(("top_p", value) for value in (1.1, -1)),
        *(("min_p", value) for value in (1.1, -1)),
        *(("top_k", value) for value in (-2, 1.5, False)),
        *(("seed", value) for value in (2**64, 1.5, False)),
        *(("n", value) for value in (0, 129, 1.5, True)),
        *(("best_of", value) for value in (0, 1.5, True)),
        *(("logprobs", value) for value in (-1, 21, 1.5, True)),
        *(("prompt_logprobs", value) for value in (-1, 21)),
        *(("repetition_penalty", value) for value in (0, -1, 101)),
        *(("presence_penalty", value) for value in (2.1, "1", True)),
        *(("logit_bias", value) for value in ([1], {"a": 1}, {"1": 101}, {"1": "x"}, {"-1": 1})),
        *(("stop", value) for value in (["a"] * 65, 3, [1], "a" * 1001)),
        *(("stop_token_ids", value) for value in ([-1], 3, [1.5], [True])),
        ("echo", 1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", 3),
    ],
)
async def test_bad_values_name_the_field(client, worker, name, value):
    response = await client.post(URL, json={"prompt": "x", name: value})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == name
    assert not worker.submitted


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty"])
async def test_floats_are_finite(client, name, literal):
    content = f'{{"prompt": "x", "{name}": {literal}}}'
    response = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("field", ["prompt", "stop"])
async def test_lone_surrogates_are_refused(client, field):
    content = json.dumps({"prompt": "x", field: "a\ud800"})
    response = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


async def test_unknown_model_is_told_what_is_served(client):
    response = await client.post(URL, json={"model": "gpt", "prompt": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert "'demo'" in error["message"]


async def test_full_context_has_the_words_that_clients_know(client):
    response = await client.post(URL, json={"prompt": "x" * 64, "max_tokens": 5})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "This model's maximum context length is 64 tokens" in error["message"]


@pytest.mark.parametrize("prompt", ["x" * 65, "x" * 64, [1] * 65, [9999] * 65])
async def test_a_prompt_over_the_context_is_refused_unseen(client, worker, prompt):
    worker.refusal = BadParameter("the engine was asked", "prompt")
    error = (await client.post(URL, json={"prompt": prompt})).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


async def test_engine_s_own_refusal_keeps_its_param(client, worker):
    worker.refusal = BadParameter("top_k must be small", "top_k")
    error = (await client.post(URL, json={"prompt": "x"})).json()["error"]
    assert (error["param"], error["message"]) == ("top_k", "top_k must be small")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("state", "refusal", "code", "retry"),
    [
        (EngineState.LOADING, None, "model_loading", None),
        (EngineState.DRAINING, None, "draining", None),
        (EngineState.READY, QueueFull("256 requests wait"), "queue_full", None),
        (EngineState.FAILED, None, "engine_failed", "false"),
    ],
)
async def test_unavailable_says_when_to_return(client, worker, state, refusal, code, retry, stream):
    worker.state, worker.refusal = state, refusal
    response = await client.post(URL, json={"prompt": "x", "stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert response.headers.get("x-should-retry") == retry
    assert "/some/path" not in response.text


async def test_engine_dies_under_a_whole_answer(client, worker):
    worker.script = script_of(TokenEvent(" a", (1,)), EngineFailed("boom in /some/path"))
    response = await client.post(URL, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")
    assert response.headers["x-should-retry"] == "false"
    assert "/some/path" not in response.text


async def test_one_request_fails(client, worker):
    event = TokenEvent("", (), FinishReason.ERROR, error="the logits were not finite")
    worker.script = script_of(event)
    response = await client.post(URL, json={"prompt": "x"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (500, "generation_failed")
    assert error["message"] == "the logits were not finite"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "detail",
    [
        "reading /srv/packs/m/native.pack failed: Input/output error",
        "OSError: [Errno 5] Input/output error: '/srv/packs/m/native.pack'",
    ],
)
async def test_paths_stay_in_the_log(client, worker, caplog, stream, detail):
    worker.script = script_of(TokenEvent("", (), FinishReason.ERROR, error=detail))
    with caplog.at_level("ERROR", "moestro.server"):
        response = await client.post(URL, json={"prompt": "x", "stream": stream})
    assert "/srv" not in response.text
    assert "the request failed in the engine; its log says why" in response.text
    assert detail in caplog.text


async def test_every_stream_is_let_go(client, worker):
    await client.post(URL, json={"prompt": "x"})
    await client.post(URL, json={"prompt": "x", "stream": True})
    assert [request.stream.cancelled.is_set() for request in worker.submitted] == [True, True]


async def test_log_has_the_account_and_not_the_prompt(client, caplog):
    with caplog.at_level(logging.INFO, "moestro"):
        await client.post(URL, json={"prompt": "my secret"}, headers={"x-request-id": "r-1"})
    lines = [record.getMessage() for record in caplog.records if record.name == "moestro.server"]
    assert len(lines) == 1
    assert "request r-1: completions, finish=stop prompt_tokens=9 generated_tokens=4" in lines[0]
    assert "queue_s=0.250" in lines[0]
    assert "secret" not in caplog.text and "force" not in caplog.text


async def test_models(client):
    card = {
        "id": "demo",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "moestro",
        "max_model_len": 64,
    }
    response = await client.get("/v1/models")
    assert response.json() == {"object": "list", "data": [card]}
    assert (await client.get("/v1/models/demo")).json() == card
    assert (await client.get("/v1/models/other")).status_code == 404


async def test_model_names_may_have_slashes(client_for):
    client = client_for(served_model_name="org/name")
    assert (await client.get("/v1/models/org%2Fname")).json()["id"] == "org/name"
    body = {"model": "org/name", "prompt": "x"}
    assert (await client.post(URL, json=body)).json()["model"] == "org/name"


async def test_models_while_loading(client, worker: FakeWorker):
    worker.state = EngineState.LOADING
    assert (await client.get("/v1/models")).status_code == 503
