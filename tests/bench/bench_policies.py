"""Who should leave the cache: the demo model's own traces, replayed over policies and budgets.

    make bench ARGS=bench_policies

The ceiling is Belady's, who knows the future. One run is also counted live, in 16 MiB and without
prefetch: its hits must be the replay's, expert for expert.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch

from engine_kit import MIB, generate, opened
from moestro.cache import (
    DecayedFrequency,
    LayerReplay,
    Lru,
    NextUse,
    PerLayer,
    Phase,
    Policy,
    TraceEvent,
    TraceReader,
    TraceWriter,
    belady,
    replay,
)
from moestro.engine import SamplingParams
from moestro.engine.loader import Loaded
from moestro.factorize import prepare_demo

PROMPTS = [
    "Gravity is the force that",
    "Write a short poem about the sea and a lighthouse keeper.\n",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The history of the Roman Empire began when",
]
LONG_PROMPT = (
    "The old harbour town had three streets, a church and a market where fishermen sold their"
    " catch each morning. "
) * 24
DECODE_TOKENS = 64
SLOTS = (12, 75, 151, 360, 540)

Build = Callable[[], Policy]
POLICIES: dict[str, Build] = {
    "LRU": Lru,
    "LRU, slots shared by layer": lambda: PerLayer(Lru),
    "decayed frequency": DecayedFrequency,
    "decayed frequency, slots shared by layer": lambda: PerLayer(DecayedFrequency),
    "next use, half-life 4": lambda: NextUse(4),
    "next use, half-life 8": lambda: NextUse(8),
    "next use, half-life 16 (default)": NextUse,
    "next use, half-life 32": lambda: NextUse(32),
    "next use, half-life 16, frequency alone": lambda: NextUse(16, 0.0),
}


def main() -> None:
    torch.set_num_threads(1)
    cache_dir = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    demo = prepare_demo(cache_dir, lambda _: None)
    report.show(f"machine: {report.machine()}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results: dict[str, Any] = {"live": live(demo, cache_dir, folder / "live.trace")}
        with opened(demo, cache_dir, host_memory_bytes=90 * MIB, **SETTINGS) as loaded:
            for name, runs in WORKLOADS.items():
                path = folder / f"{name}.trace"
                record(loaded, path, runs)
                results[name] = table(name, TraceReader(path))
    report.finish("policies", results)


SETTINGS: dict[str, Any] = {"kv_memory_bytes": 64 * MIB, "prefetch": False}
ONE_BY_ONE: list[Sequence[str]] = [[prompt] for prompt in PROMPTS]
WORKLOADS: dict[str, list[Sequence[str]]] = {
    "one by one": ONE_BY_ONE,
    "mixed": [[PROMPTS[0]], [LONG_PROMPT], [PROMPTS[1]], PROMPTS],
}


def live(demo: Path, cache_dir: Path, path: Path) -> dict[str, Any]:
    """Counts a run in 16 MiB, and its replay."""
    with opened(demo, cache_dir, host_memory_bytes=16 * MIB, **SETTINGS) as loaded:
        before, slots = loaded.cache.stats().lookups, loaded.cache.plan.slots
        seconds = record(loaded, path, ONE_BY_ONE)
        stats = loaded.cache.stats()
    trace = TraceReader(path)
    replayed = replay(trace, trace.header.experts_per_layer, slots, NextUse())
    same = [LayerReplay(x.hits, x.misses) for x in stats.layers] == list(replayed.layers)
    tokens = DECODE_TOKENS * len(ONE_BY_ONE)
    hits = f"{stats.hits} of {stats.lookups} lookups"
    if before:
        report.show("the self-check has used this cache already: run once more to compare hits")
    else:
        report.show(f"live in {slots} slots: {hits}; replayed the same: {same}")
    report.show(f"  {tokens / seconds:.1f} tok/s, stalls {stats.decode_stall_s:.1f} s")
    return {
        "slots": slots,
        "hits": stats.hits,
        "lookups": stats.lookups,
        "replayed_the_same": same if not before else None,
        "tokens_per_s": tokens / seconds,
        "stall_s": stats.decode_stall_s,
    }


def record(loaded: Loaded, path: Path, runs: Sequence[Sequence[str]]) -> float:
    """Each run is a batch of prompts; how long all of them took."""
    params = SamplingParams(max_tokens=DECODE_TOKENS, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    with TraceWriter(path, loaded.cache.spec) as writer:
        loaded.cache.record(writer)
        for prompts in runs:
            generate(loaded.engine, [loaded.tokenizer.encode(each) for each in prompts], params)
        loaded.cache.record(None)
    return time.perf_counter() - began


def table(name: str, trace: TraceReader) -> dict[str, Any]:
    """Prints hit rates of decode by policy (rows) and slots (columns)."""
    events, experts = list(trace), trace.header.experts_per_layer
    total = sum(experts)
    asked = [len(event.experts) for event in events if event.phase is Phase.DECODE]
    report.show(
        f"{name}: {events[-1].step + 1} steps, {sum(asked) / len(asked):.1f} of {experts[0]}"
        f" experts in each of {len(experts)} layers; hit rates of decode in percent"
    )
    report.show(f"  {'slots of ' + str(total):42}" + "".join(f"{slots:>8}" for slots in SLOTS))
    rows = {each: rates(events, experts, build) for each, build in POLICIES.items()}
    rows["Belady (ceiling)"] = [
        100 * belady(events, experts, slots).hit_rate(Phase.DECODE) for slots in SLOTS
    ]
    for each, row in rows.items():
        report.show(f"  {each:42}" + "".join(f"{rate:8.1f}" for rate in row))
    return {"slots": SLOTS, "decode_hit_percent": rows}


def rates(events: Sequence[TraceEvent], experts: Sequence[int], build: Build) -> list[float]:
    return [100 * replay(events, experts, slots, build()).hit_rate(Phase.DECODE) for slots in SLOTS]


if __name__ == "__main__":
    main()
