"""What an answer says arrives unbroken through readers that cut lines their own way."""

import json

import httpx
import pytest

from fake_engine import FakeWorker, script_of
from moestro.engine import FinishReason, TokenEvent

URL = "/v1/completions"
ENDS = [
    "\u2028",
    "\u2029",
    "\u0085",
    "\x0b",
    "\x0c",
    "\r",
    "\n",
    "\r\n",
    "\0",
    "\x1c",
    "\x1d",
    "\x1e",
]
TEXT = "".join(f"a{end}b{end}" for end in ENDS) + "".join(ENDS) + "data: [DONE]\n\n: x\nid: 1\n\n"


@pytest.fixture
def worker() -> FakeWorker:
    """Every line end within a piece, and each as a piece of its own."""
    pieces = [*(TokenEvent(end, (1,)) for end in ENDS), TokenEvent(TEXT, (1,))]
    return FakeWorker(script_of(*pieces, TokenEvent("", (2,), FinishReason.STOP)))


def text_of(lines: list[str]) -> str:
    data = [line.removeprefix("data: ") for line in lines if line]
    assert all(line.startswith("data: ") for line in lines if line), lines
    assert data.pop() == "[DONE]"
    return "".join(json.loads(one)["choices"][0]["text"] for one in data)


async def test_lines_are_unbroken_to_httpx(client: httpx.AsyncClient) -> None:
    async with client.stream("POST", URL, json={"prompt": "x", "stream": True}) as response:
        assert text_of([line async for line in response.aiter_lines()]) == "".join(ENDS) + TEXT


async def test_lines_are_unbroken_to_readers_of_any_pieces(client: httpx.AsyncClient) -> None:
    """httpx' and requests' `iter_lines` split decoded pieces with `str.splitlines`."""
    sent = (await client.post(URL, json={"prompt": "x", "stream": True})).content
    assert text_of(sent.decode().splitlines()) == "".join(ENDS) + TEXT
    assert text_of(sent.decode().split("\n")) == "".join(ENDS) + TEXT
    for size in (1, 2, 7, 64):
        pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
        response = httpx.Response(200, content=iter(pieces))
        assert text_of(list(response.iter_lines())) == "".join(ENDS) + TEXT
