"""Chat over the fake engine: requests, scripts, and what chunks add up to."""

import json
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import httpx

from chat_formats import FORMATS, ChatFormat
from fake_engine import MODEL, FakeWorker
from moestro.engine import FinishReason, SamplingParams, TokenEvent

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
HERMES = FORMATS[0]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def chatting(form: ChatFormat) -> FakeWorker:
    made = FakeWorker()
    made.tokens.chat = form
    made.info = replace(MODEL, max_model_len_tokens=10_000)
    return made


def pieces_of(text: str, seed: int) -> list[str]:
    chance, pieces = random.Random(seed), []
    while text:
        size = chance.randint(1, 7)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def says(*texts: str, seed: int = 0) -> Any:
    """A script: request after request another text, in random pieces."""
    left = list(texts)

    async def play(ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent]:
        pieces = pieces_of(left.pop(0) if len(left) > 1 else left[0], seed)
        for place, piece in enumerate(pieces):
            last = FinishReason.STOP if place == len(pieces) - 1 else None
            yield TokenEvent(piece, (1,), last)

    return play


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json={"messages": HI, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def streamed(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(URL, json={"messages": HI, **fields, "stream": True})
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", ""), response.text
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def added(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice that chunks add up to."""
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    reason = None
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = dict(choice["delta"])
        assert delta or choice["finish_reason"]
        for call in delta.pop("tool_calls", []):
            if call["index"] == len(calls):
                calls.append({name: call[name] for name in ("id", "type", "function")})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        for name, text in delta.items():
            message[name] = message.get(name, "") + text
        reason = reason or choice["finish_reason"]
    if calls:
        message["tool_calls"] = calls
    return {"message": message, "finish_reason": reason}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    names = ("role", "content", "reasoning_content")
    return {name: message.get(name) or None for name in names} | {"calls": calls}
