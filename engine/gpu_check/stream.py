"""One sequence through an engine's passes, without scheduler and sampler.

An engine's own step ends the sequences of a pass that fails; here the error comes out, whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from moestro.engine.facts import PAGE_TOKENS, round_up_tokens
from moestro.engine.step import Batch, Part, SamplingParams
from moestro.engine.step import Sequence as Running

from .bench import Opened


class Stream:
    """Tokens in, logits of the next one out."""

    def __init__(self, opened: Opened, running: Running) -> None:
        self._opened, self._running = opened, running
        self._fresh = True

    def advance(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [V], fp32, on the host, behind `ids`. Raises what the pass raises."""
        if not self._fresh:
            self._running.token_ids += ids
        self._fresh = False
        batch = Batch((Part(self._running, len(ids)),))
        return self._opened.engine.runner.run(batch).logits[0]


@contextmanager
def stream(opened: Opened, prompt: Sequence[int], most_tokens: int) -> Iterator[Stream]:
    """Of a sequence with `prompt`, which the first `advance` has to be given."""
    engine = opened.engine
    running = Running(0, list(prompt), SamplingParams(max_tokens=most_tokens))
    pages = round_up_tokens(len(prompt) + most_tokens) // PAGE_TOKENS
    running.pages = engine.scheduler.pool.take(pages)
    try:
        yield Stream(opened, running)
    finally:
        engine.runner.forget(running)
        engine.scheduler.pool.release(running.pages)


def greedy(opened: Opened, prompt: Sequence[int], tokens: int) -> list[int]:
    """What the model answers, the most likely token each time."""
    found: list[int] = []
    with stream(opened, prompt, tokens) as running:
        logits = running.advance(prompt)
        for _ in range(tokens):
            found.append(int(logits.argmax()))
            logits = running.advance(found[-1:])
    return found


def forced(opened: Opened, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Logits [1 + len(answer), V]: behind the prompt, and behind each token of `answer`."""
    with stream(opened, prompt, len(answer) + 1) as running:
        rows = [running.advance(prompt), *(running.advance([token]) for token in answer)]
    return torch.stack(rows)
