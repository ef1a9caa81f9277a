"""Record which experts a model asks for, and replay the record over budgets and policies.

A recording runs prompts one after another through a real engine, without prefetch; a replay needs
no model. Hits of a replay are those that a live cache would have counted, event for event.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moestro.cache import (
    CacheError,
    DecayedFrequency,
    LiveCount,
    Lru,
    NextUse,
    Phase,
    TraceReader,
    TraceWriter,
    belady,
)
from moestro.cache import replay as replay_policy
from moestro.engine.facts import (
    BadParameter,
    EngineConfig,
    Progress,
    ProgressFn,
    PromptTooLong,
    StartError,
)
from moestro.engine.step import SamplingParams
from moestro.engine.step import Sequence as Running

from .loader import Loaded, load

SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)  # of all experts: the budgets of a replay
CURVE_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
CEILING = "Belady (ceiling)"
POLICIES = {"next use (default)": NextUse, "decayed frequency": DecayedFrequency, "LRU": Lru}


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a recording held."""

    prompts: int
    tokens: int  # generated
    lookups: int


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """Hit rates of decode, 0 to 1, one per budget."""

    policy: str
    hit_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LivePoint:
    """What the recording run had; its cache was not empty when it began."""

    slots: int
    hit_rate: float  # of decode, 0 to 1


@dataclass(frozen=True, slots=True)
class ReplayTable:
    """One trace over all budgets and policies; the last row is what perfect foresight gets."""

    steps: int
    experts: int  # of the model
    slots: tuple[int, ...]
    slot_bytes: int
    rows: tuple[ReplayRow, ...]
    live: LivePoint | None


def record_trace(
    config: EngineConfig,
    prompts: Sequence[str],
    tokens: int,
    out: Path,
    progress: ProgressFn,
    prepare: Callable[[ProgressFn], Path] | None = None,
) -> Recorded:
    """Run `prompts`, `tokens` new ones each, greedily; write the trace to `out`.

    Raises StartError (also where a prompt does not fit) or CacheError.
    """
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    loaded = load(replace(config, prefetch=False), progress, prepare)
    try:
        before = loaded.stats()
        hits = asked = 0  # in decode
        with TraceWriter(out, loaded.cache.spec) as writer:
            loaded.cache.record(writer)
            for done, prompt in enumerate(prompts):
                progress(Progress("record", done, len(prompts), "prompts"))
                for change in _run(loaded, done, prompt, params):
                    hits, asked = hits + change[0], asked + change[1]
            loaded.cache.record(None)
            writer.live(LiveCount(loaded.cache.plan.slots, hits, asked))
        progress(Progress("record", len(prompts), len(prompts), "prompts"))
        after = loaded.stats()
    except (BadParameter, PromptTooLong) as error:
        raise StartError(f"prompt {done + 1}: {error}") from error
    finally:
        loaded.close()
    lookups = after.cache.lookups - before.cache.lookups
    return Recorded(len(prompts), after.generation_tokens, lookups)


def replay_trace(path: Path, shares: Sequence[float] = SHARES) -> ReplayTable:
    """Over budgets for these shares of all experts. Raises StartError where `path` is no trace."""
    try:
        reader = TraceReader(path)
        events, per_layer = list(reader), reader.header.experts_per_layer
        slot_bytes = max(layer.stride_bytes for layer in reader.header.layers)
    except (CacheError, OSError) as error:
        raise StartError(f"{path}: {error}") from error
    if not events:
        raise StartError(f"{path}: the trace holds no event")
    total = sum(per_layer)
    slots = tuple(dict.fromkeys(max(1, round(total * share)) for share in shares))
    rows = [
        ReplayRow(
            name,
            tuple(
                replay_policy(events, per_layer, size, make()).hit_rate(Phase.DECODE)
                for size in slots
            ),
        )
        for name, make in POLICIES.items()
    ]
    ceiling = tuple(belady(events, per_layer, size).hit_rate(Phase.DECODE) for size in slots)
    rows.append(ReplayRow(CEILING, ceiling))
    live = None
    if reader.live is not None and reader.live.lookups:
        live = LivePoint(reader.live.slots, reader.live.hits / reader.live.lookups)
    return ReplayTable(events[-1].step + 1, total, slots, slot_bytes, tuple(rows), live)


def _run(
    loaded: Loaded, number: int, prompt: str, params: SamplingParams
) -> Iterator[tuple[int, int]]:
    """Steps through one prompt; gives hits and lookups of every decode step."""
    ids = loaded.tokenizer.encode(prompt)
    loaded.engine.validate(ids, params)
    loaded.engine.add(Running(number, ids, params))
    while not loaded.engine.idle:
        before = loaded.stats()
        for _, event in loaded.engine.step():
            if event.error is not None:
                raise StartError(f"prompt {number + 1}: {event.error}")
        after = loaded.stats()
        if after.decode_steps > before.decode_steps:
            yield (
                after.cache.hits - before.cache.hits,
                after.cache.lookups - before.cache.lookups,
            )
