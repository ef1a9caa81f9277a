"""The stock client gets its answer once the queue has drained, without a line of its own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import openai
import pytest

from fake_engine import FakeStream, FakeWorker
from moestro.engine import QueueFull, SamplingParams
from moestro.server.contract.errors import ROWS

Serving = Callable[..., AbstractAsyncContextManager[str]]


class FullForAWhile(FakeWorker):
    """Its queue has no room for the first `refusals` requests."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.refusals_left = refusals

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> FakeStream:
        if self.refusals_left:
            self.refusals_left -= 1
            raise QueueFull("the queue is full")
        return super().submit(prompt_ids, params)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the seconds that clients are told."""
    row: Any = replace(ROWS[QueueFull], retry_after_s=0.01)  # type: ignore[arg-type]
    monkeypatch.setitem(ROWS, QueueFull, row)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_stock_client_succeeds_after_the_queue_drains(
    stream: bool, serving: Serving
) -> None:
    worker = FullForAWhile(refusals=2)  # as often as the client tries again by default
    async with (
        serving(worker) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as client,
    ):
        answer: Any = await client.completions.create(model="demo", prompt="x", stream=stream)
        texts = [c.choices[0].text async for c in answer] if stream else [answer.choices[0].text]
    assert "".join(texts) == " a force."
    assert worker.refusals_left == 0 and len(worker.submitted) == 1


async def test_a_queue_that_stays_full_is_told_as_such(serving: Serving) -> None:
    async with (
        serving(FullForAWhile(refusals=3)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k") as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="demo", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
