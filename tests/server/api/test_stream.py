"""Server-sent events, and what happens when a client leaves: over a real connection."""

import asyncio
import json

import httpx
import openai
import pytest

from fake_engine import FakeWorker, eventually, one_then_silence, script_of, within
from moestro.engine import EngineFailed, EngineState, FinishReason, SamplingParams, TokenEvent
from moestro.server.api.joined import Joined
from moestro.server.api.stream import ClientGone, watched

URL = "/v1/completions"
BODY = {"prompt": "Gravity is", "stream": True}


async def lines_of(client: httpx.AsyncClient, **fields: object) -> list[str]:
    response = await client.post(URL, json=BODY | fields)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    return response.text.removesuffix("\n\n").split("\n\n")


def data_of(line: str) -> dict:
    assert line.startswith("data: ")
    return json.loads(line.removeprefix("data: "))


async def test_stream_is_openai_s(client):
    *lines, last = await lines_of(client)
    assert last == "data: [DONE]"
    chunks = [data_of(line) for line in lines]
    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "text": " a", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": " force.", "logprobs": None, "finish_reason": "stop"},
    ]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_last_when_asked_for(client):
    *lines, usage, last = await lines_of(client, stream_options={"include_usage": True})
    assert last == "data: [DONE]"
    assert all(data_of(line)["usage"] is None for line in lines)
    chunk = data_of(usage)
    assert chunk["choices"] == []
    assert chunk["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}


async def test_last_chunk_may_have_no_text(client, worker):
    worker.script = script_of(
        TokenEvent("a", (1,)), TokenEvent("", (2,)), TokenEvent("", (3,), FinishReason.LENGTH)
    )
    first, last, _ = await lines_of(client)
    assert data_of(first)["choices"][0]["text"] == "a"
    assert data_of(last)["choices"][0] | {"index": 0} == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
    }


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (EngineFailed("gone"), "engine_failed"),
        (TokenEvent("", (), FinishReason.ERROR, error="not finite"), "generation_failed"),
    ],
)
async def test_failure_after_the_first_byte_is_an_event_without_done(client, worker, end, code):
    worker.script = script_of(TokenEvent(" a", (1,)), end)
    lines = await lines_of(client)
    assert data_of(lines[-1])["error"]["code"] == code
    assert "[DONE]" not in "".join(lines)


async def test_quiet_streams_are_kept_alive(client_for, worker):
    async def slow(ids, params):
        yield TokenEvent(" a", (1,))
        await asyncio.sleep(0.25)
        yield TokenEvent(" b", (2,), FinishReason.STOP)

    worker.script = slow
    lines = await lines_of(client_for(keep_alive=0.1))
    comments, _, event = lines[1].rpartition(": keep-alive\n")
    assert comments == ": keep-alive\n", "no blank line: to some readers that is an empty event"
    assert data_of(event)["choices"][0]["text"] == " b"


async def test_client_leaves_a_stream(serving):
    worker = FakeWorker(one_then_silence)
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", URL, json=BODY) as response:
            assert await anext(response.aiter_lines())
        await within(2, worker.submitted[0].stream.cancelled.wait())
        assert worker.idle
        page = (await client.get("/metrics")).text
    assert 'moestro_requests_total{endpoint="completions",finish_reason="abort"} 1.0' in page


async def test_client_leaves_before_a_whole_answer(serving):
    worker = FakeWorker(one_then_silence)
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post(URL, json={"prompt": "x"}))
        await eventually(lambda: bool(worker.submitted))
        asking.cancel()
        await within(2, worker.submitted[0].stream.cancelled.wait())


async def test_others_go_on_when_one_leaves(serving):
    release = asyncio.Event()

    async def waits(ids, params):
        yield TokenEvent(" a", (1,))
        await release.wait()
        yield TokenEvent(" b", (2,), FinishReason.STOP)

    worker = FakeWorker(waits)
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        stays = [asyncio.create_task(client.post(URL, json=BODY)) for _ in range(3)]
        async with client.stream("POST", URL, json=BODY) as response:
            await anext(response.aiter_lines())
        await eventually(lambda: len(worker.submitted) == 4 and len(worker.open) == 3)
        release.set()
        answers = await asyncio.gather(*stays)
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)


async def test_shutdown_ends_streams_with_an_error(serving):
    worker = FakeWorker(one_then_silence)
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post(URL, json=BODY))
        await eventually(lambda: bool(worker.submitted))
        worker.drain()
        await asyncio.to_thread(worker.stop)
        text = (await asking).text
    assert "shutting down" in text and '"draining"' in text and "[DONE]" not in text


async def test_watched_hears_the_client_before_the_next_token():
    worker = FakeWorker(one_then_silence)
    hangs_up = asyncio.Event()

    async def receive():
        await hangs_up.wait()
        return {"type": "http.disconnect"}

    stream = worker.submit([1], SamplingParams())
    events = watched(Joined([stream], 1), receive)
    first = await anext(events)
    assert first is not None and first[1].text == " a"
    hangs_up.set()
    with pytest.raises(ClientGone):
        await within(1, anext(events))
    assert stream.cancelled.is_set()


async def test_official_client(serving):
    worker = FakeWorker()
    async with (
        serving(worker, api_key="k") as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        whole = await client.completions.create(model="demo", prompt="Gravity is")
        stream = await client.completions.create(model="demo", prompt="x", stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
        assert "".join(pieces) == whole.choices[0].text == " a force."
        assert (await client.models.retrieve("demo")).id == "demo"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="other", prompt="x")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        worker.state = EngineState.FAILED
        with pytest.raises(openai.InternalServerError) as broken:
            await client.completions.create(model="demo", prompt="x")
        assert broken.value.code == "engine_failed"
