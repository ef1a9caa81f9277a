"""An engine without its thread: load, step, collect."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moestro.engine import EngineConfig, Progress, SamplingParams
from moestro.engine.facts.device import choose
from moestro.engine.loader import Loaded, load
from moestro.engine.step.core import Engine
from moestro.engine.step.sequence import Batch, Part
from moestro.engine.step.sequence import Sequence as Running

KIB = 1024
MIB = 1024 * KIB


def ignore(_: Progress) -> None:
    """A progress bar for nobody."""


@contextmanager
def opened(folder: Path, cache_dir: Path, **settings: Any) -> Iterator[Loaded]:
    """A loaded engine on one thread; closed afterwards. `choose_device` is for `load`."""
    defaults = {"kv_memory_bytes": 4 * MIB, "threads": 1}
    choose_device = settings.pop("choose_device", choose)
    config = EngineConfig(folder, cache_dir, **defaults | settings)
    loaded = load(config, ignore, choose_device=choose_device)
    try:
        yield loaded
    finally:
        loaded.close()


def logits_of(
    folder: Path, cache_dir: Path, prompt: Sequence[int], **settings: Any
) -> torch.Tensor:
    """[3, V]: behind `prompt`, and after the tokens 7 and 8, one a step."""
    with opened(folder, cache_dir, **settings) as loaded:
        sequence = Running(0, list(prompt), SamplingParams(max_tokens=8))
        engine = loaded.engine
        sequence.pages = engine.scheduler.pool.take(4)
        rows = [engine.runner.run(Batch((Part(sequence, len(prompt)),))).logits]
        for token in (7, 8):
            sequence.token_ids.append(token)
            rows.append(engine.runner.run(Batch((Part(sequence, 1),))).logits)
        engine.runner.forget(sequence)
        engine.scheduler.pool.release(sequence.pages)
    return torch.cat(rows)


class Generation:
    """What came out for one prompt."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self.error: str | None = None


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[Generation]:
    """All prompts at once, with the same parameters."""
    return generate_each(engine, [(ids, params) for ids in prompts])


def generate_each(
    engine: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]]
) -> list[Generation]:
    """All at once, stepped until every one has ended; checks the engine at each step."""
    sequences = [Running(number, ids, params) for number, (ids, params) in enumerate(requests)]
    found = {sequence.number: Generation() for sequence in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        for sequence, event in engine.step():
            generation = found[sequence.number]
            generation.ids += event.token_ids
            generation.text += event.text
            if event.finish_reason is not None:
                generation.finish = event.finish_reason.value
                generation.error = event.error
        engine.check()
    return list(found.values())


def run_logits(loaded: Loaded, steps: Sequence[Sequence[tuple[int, list[int]]]]) -> torch.Tensor:
    """Raw logits of hand-made steps: each a list of (sequence number, its next ids).

    A sequence's first ids are its prompt. Every part ends its pending tokens, so each gives one
    row; rows of all steps, stacked.
    """
    known: dict[int, Running] = {}
    rows = []
    for step in steps:
        parts = []
        for number, ids in step:
            if number not in known:
                known[number] = Running(number, ids, SamplingParams(max_tokens=64))
            else:
                known[number].token_ids += ids
            parts.append(Part(known[number], len(ids)))
        for sequence in known.values():
            sequence.pages = sequence.pages or loaded.engine.scheduler.pool.take(8)
        rows.append(loaded.engine.runner.run(Batch(tuple(parts))).logits)
        loaded.cache.check()
    for sequence in known.values():
        loaded.engine.runner.forget(sequence)
        loaded.engine.scheduler.pool.release(sequence.pages)
    return torch.cat(rows)
