"""Chat over the fake engine: fields, messages, tools in every format, reasoning; stream = whole."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import openai
import pytest

from chat_formats import FORMATS, written
from chat_kit import HERMES, HI, URL, WEATHER, added, ask, chatting, says, streamed, without_ids
from fake_engine import FakeWorker, script_of
from moestro.engine import (
    FinishReason,
    SamplingParams,
    TemplateRefused,
    TokenEvent,
    TokenLogprob,
)

BROKEN_CALL = {"function": {"name": "f", "arguments": "{"}}
by_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.template)


@pytest.fixture
def worker() -> FakeWorker:
    return chatting(HERMES)


async def test_an_answer_is_openai_s_object(client, worker):
    worker.script = says("Hello.")
    body = await ask(client, model="demo")
    assert body.pop("id").startswith("chatcmpl-") and isinstance(body.pop("created"), int)
    prompt_tokens = len(worker.submitted[0].ids)
    message = {"role": "assistant", "content": "Hello.", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 1,
            "total_tokens": prompt_tokens + 1,
        },
    } | {"usage": body["usage"]}
    assert body["usage"]["prompt_tokens"] == prompt_tokens


async def test_what_is_left_is_the_default(client, worker):
    await ask(client)
    params = worker.submitted[0].params
    assert params.max_tokens == 10_000 - len(worker.submitted[0].ids)
    await ask(client, max_completion_tokens=5)
    assert worker.submitted[1].params.max_tokens == 5


async def test_null_is_a_default_everywhere(client, worker):
    fields = (
        "model max_tokens max_completion_tokens temperature top_p top_k min_p seed stop n stream "
        "stream_options user logprobs top_logprobs tools tool_choice parallel_tool_calls "
        "response_format reasoning_effort chat_template_kwargs presence_penalty logit_bias "
        "frequency_penalty metadata store service_tier modalities audio prediction functions"
    )
    await ask(client, **dict.fromkeys(fields.split()))
    assert worker.submitted[0].params.temperature == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", []),
        ("messages", None),
        ("messages", "Hi"),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": 3}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "assistant", "tool_calls": [BROKEN_CALL]}]),
        ("messages", [{"role": "user", "content": "a\ud800"}]),
        ("max_tokens", 0),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "web_search"}]),
        ("tools", 3),
        ("tool_choice", "any"),
        ("tool_choice", "required"),
        ("reasoning_effort", "very"),
        ("chat_template_kwargs", 3),
        ("chat_template", "{{ x }}"),
        ("echo", True),
        ("prompt", "x"),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "a"}),
        ("stream_options", {"include_usage": True}),
    ],
)  # fmt: skip
async def test_bad_values_name_the_field(client, worker, name, value):
    content = json.dumps({"messages": HI, name: value})
    response = await client.post(URL, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name), response.text
    assert not worker.submitted


async def test_parts_are_joined_and_roles_and_arguments_are_as_templates_take_them(client, worker):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    await ask(client, messages=messages)
    given = worker.tokens.rendered[0]["messages"]
    assert [message["role"] for message in given] == ["system", "user", "assistant", "tool"]
    assert given[1]["content"] == "a\nb"
    assert given[2]["content"] == ""
    assert given[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert given[3]["tool_call_id"] == "c1"


async def test_variables_reach_the_template(client, worker):
    await ask(client, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert worker.tokens.rendered[0]["enable_thinking"] is False
    assert worker.tokens.rendered[0]["reasoning_effort"] == "low"


async def test_a_template_s_own_words_are_a_400(client, worker, monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise TemplateRefused("roles must alternate", "messages")

    monkeypatch.setattr(worker.tokens, "render_chat", refuse)
    response = await client.post(URL, json={"messages": HI})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"] == "roles must alternate"


async def test_a_model_without_template_says_so(client, worker):
    worker.tokens.chat = None
    response = await client.post(URL, json={"messages": HI})
    assert response.status_code == 400 and "no chat template" in response.text


@by_format
@pytest.mark.parametrize("seed", range(4))
async def test_calls_come_out_of_every_format_streamed_as_whole(client_for, worker, form, seed):
    worker.tokens.chat = form
    calls = [
        {"function": {"name": "weather", "arguments": {"city": 'Zü"rich}', "days": 2}}},
        {"function": {"name": "weather", "arguments": {"city": "Bern"}}},
    ]
    if form.template == "harmony":
        calls = calls[:1]  # one call an answer
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    worker.script = says(written(form.template, message), seed=seed)
    client = client_for()
    body = await ask(client, tools=[WEATHER])
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    found = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [call["name"] for call in found] == ["weather"] * len(calls)
    assert [json.loads(call["arguments"]) for call in found] == [
        call["function"]["arguments"] for call in calls
    ]
    total = added(await streamed(client, tools=[WEATHER]))
    assert without_ids(total["message"]) == without_ids(choice["message"])
    assert total["finish_reason"] == "tool_calls"
    assert not worker.submitted[0].params.skip_special_tokens


async def test_reasoning_is_apart(client, worker):
    worker.script = says("<think>\nwell\n</think>\n\nYes.<|im_end|>")
    body = await ask(client)
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("well", "Yes.")
    total = added(await streamed(client))
    assert without_ids(total["message"]) == without_ids(message)


async def test_markers_are_text_without_tools(client, worker):
    worker.script = says('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    message = (await ask(client))["choices"][0]["message"]
    assert "tool_calls" not in message and '"name": "f"' in message["content"]
    await ask(client, tools=[WEATHER], tool_choice="none")
    assert worker.tokens.rendered[-1]["tools"] is None


async def test_a_template_that_shows_no_tools_refuses_them_by_name(client, worker, monkeypatch):
    facts = replace(worker.tokens.template_facts, renders_tools=False)
    monkeypatch.setattr(type(worker.tokens), "template_facts", facts)
    response = await client.post(URL, json={"messages": HI, "tools": [WEATHER]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


async def test_logprobs_are_of_every_token(client, worker):
    def event(text: str, token: int, reason: FinishReason | None = None) -> TokenEvent:
        score = TokenLogprob(token, -0.5, ((token, -0.5), (66, -1.0)))
        return TokenEvent(text, (token,), reason, token_texts=(text,), logprobs=(score,))

    worker.script = script_of(event("<thi", 65), event("s", 67), event("!", 68, FinishReason.STOP))
    body = await ask(client, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["A", "C", "D"]
    assert content[0] == {
        "token": "A",
        "logprob": -0.5,
        "bytes": [65],
        "top_logprobs": [
            {"token": "A", "logprob": -0.5, "bytes": [65]},
            {"token": "B", "logprob": -1.0, "bytes": [66]},
        ],
    }
    assert worker.submitted[0].params.logprobs == 2
    chunks = await streamed(client, logprobs=True, top_logprobs=2)
    told = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {})["content"]]
    assert told == content


async def test_several_answers(client, worker):
    async def two(ids: Sequence[int], params: SamplingParams):
        assert params.n == 2
        yield TokenEvent("a", (1,), index=0)
        yield TokenEvent("b", (1,), FinishReason.STOP, index=1)
        yield TokenEvent("c", (1,), FinishReason.LENGTH, index=0)

    worker.script = two
    choices = (await ask(client, n=2))["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["ac", "b"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "stop"]
    chunks = await streamed(client, n=2)
    first = [c for chunk in chunks for c in chunk["choices"] if c["index"] == 0]
    assert [choice["delta"] for choice in first] == [
        {"role": "assistant", "content": "a"},
        {"content": "c"},
    ]


@by_format
@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_calls_a_tool_twice(serving, form, stream):
    """The official client, its loop, and each format's template on the way back."""
    worker = chatting(form)

    def call(city: str) -> str:
        function = {"name": "weather", "arguments": {"city": city}}
        return written(form.template, {"role": "assistant", "tool_calls": [{"function": function}]})

    final = written(form.template, {"role": "assistant", "content": "Both are fine."})
    worker.script = says(call("Bern"), call("Basel"), final, seed=5)
    messages: list[Any] = [{"role": "user", "content": "Weather in Bern and Basel?"}]
    async with (
        serving(worker) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        for _ in range(3):
            message = await one_turn(client, messages, stream)
            messages.append(message)
            for called in message.get("tool_calls") or []:
                city = json.loads(called["function"]["arguments"])["city"]
                messages.append(
                    {"role": "tool", "tool_call_id": called["id"], "content": f"{city}: sun"}
                )
    assert messages[-1]["content"] == "Both are fine."
    prompt = bytes(worker.submitted[-1].ids).decode()
    assert "Bern: sun" in prompt and "Basel: sun" in prompt


async def one_turn(client: openai.AsyncOpenAI, messages: list[Any], stream: bool) -> dict[str, Any]:
    if not stream:
        whole = await client.chat.completions.create(
            model="demo",
            messages=messages,
            tools=[WEATHER],  # type: ignore[list-item]
        )
        return whole.choices[0].message.model_dump(exclude_none=True)
    async with client.chat.completions.stream(
        model="demo",
        messages=messages,
        tools=[WEATHER],  # type: ignore[list-item]
    ) as events:
        async for _ in events:
            await asyncio.sleep(0)
        last = await events.get_final_completion()
    dumped = last.choices[0].message.model_dump(exclude_none=True)
    for call in dumped.get("tool_calls") or []:
        call["function"].pop("parsed_arguments", None)
    dumped.pop("parsed", None)
    return dumped
