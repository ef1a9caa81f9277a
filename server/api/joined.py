"""The streams of several prompts as one."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from moestro.engine import FinishReason, SamplingParams, TokenEvent
from moestro.server.contract import Stream, Worker


class Joined:
    """Events of all streams as they come, each with its stream's number.

    Ends when every stream has given its last event, or with the first error of any.
    """

    def __init__(self, streams: Sequence[Stream], answers: int) -> None:
        """`answers`: to each prompt, so many last events has each stream."""
        self._streams = list(streams)
        self._left = [answers] * len(streams)
        self._coming: dict[asyncio.Future[TokenEvent], int] = {}
        self.over = False

    @property
    def prompt_tokens(self) -> int:
        return sum(stream.prompt_tokens for stream in self._streams)

    async def __anext__(self) -> tuple[int, TokenEvent]:
        waited_for = set(self._coming.values())
        for number, stream in enumerate(self._streams):
            if self._left[number] and number not in waited_for:
                self._coming[asyncio.ensure_future(stream.__anext__())] = number
        done, _ = await asyncio.wait(self._coming, return_when=asyncio.FIRST_COMPLETED)
        first = min(done, key=self._coming.__getitem__)
        number = self._coming.pop(first)
        event = first.result()
        self._left[number] -= event.finish_reason is not None
        failed = event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT)
        self.over = failed or not any(self._left)
        return number, event

    def cancel(self) -> None:
        """Idempotent."""
        for stream in self._streams:
            stream.cancel()
        for task in self._coming:
            drop(task)
        self._coming.clear()


def submit_all(
    worker: Worker, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> Joined:
    """All or none: where one is refused, those before it are let go."""
    streams: list[Stream] = []
    with ExitStack() as undo:
        for ids, wanted in zip(prompts, params, strict=True):
            streams.append(worker.submit(ids, wanted))
            undo.callback(streams[-1].cancel)
        undo.pop_all()
    return Joined(streams, params[0].n)


def drop(task: "asyncio.Future[Any]") -> None:
    """Cancel what nobody waits for any more."""
    task.cancel()
    # Asked for its error, so that asyncio does not complain that nobody did.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
