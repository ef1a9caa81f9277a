"""What reading ahead gains and costs on the demo model, and what a prompt tells about its answer.

    make bench ARGS=bench_prefetch

Warm-up is replayed from traces, with a prompt's routing counts and without them. Guesses are live:
engines that guess none, one or two experts take turns, step by step, so that all see the same
machine; switching itself off is cut short, so that its account is of guessing all the time.
"""

import inspect
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import report
import torch

from engine_kit import opened
from moestro.cache import (
    NextUse,
    Phase,
    TraceEvent,
    TraceReader,
    TraceWriter,
    belady,
    replay_events,
)
from moestro.engine import EngineStats, SamplingParams
from moestro.engine.loader import Loaded
from moestro.engine.model import regret
from moestro.engine.step.sequence import Sequence as Running
from moestro.factorize import prepare_demo

BLOB = 110_592
SHARES = (0.1, 0.2, 0.4)
FIRST_STEPS = 32
PROMPTS = [
    "Gravity is the force that",
    "Write a short poem about the sea and a lighthouse keeper.\n",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The history of the Roman Empire began when",
    topics["while"][:900],
    inspect.getsource(shutil)[4000:5200],
    topics["lambda"][:400] + topics["integers"][:400],
    "Dear Anna,\n\nthank you for your letter. We came home from the mountains on Sunday, tired and"
    " happy. The children had seen a fox, and Peter had lost his boots in the river; he walked the"
    " last hour in his socks, singing. ",
    inspect.getsource(tempfile)[3000:4000],
    "Photosynthesis is the process by which green plants convert light into chemical energy. In the"
    " first stage, light is absorbed by chlorophyll; water is split and oxygen is released. In the"
    " second stage, the Calvin cycle,",
]
ANSWER_TOKENS = 64
ARRIVAL_STEPS = 24  # between two prompts, where answers overlap
LIVE_SHARES = (0.2, 0.5)
WARM_STEPS = 8
LIVE_STEPS = 72  # more than are measured and then judged
GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("moestro.engine").setLevel(logging.ERROR)
    regret.FIRST_PAUSE_STEPS = regret.LONGEST_PAUSE_STEPS = 1
    cache_dir = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    demo = prepare_demo(cache_dir, lambda _: None)
    report.show(f"machine: {report.machine()}")
    results: dict[str, Any] = {"warm_up": warm_up(demo, cache_dir)}
    results["guesses"] = [live(demo, cache_dir, share) for share in LIVE_SHARES]
    report.finish("prefetch", results)


def warm_up(demo: Path, cache_dir: Path) -> list[dict[str, Any]]:
    """Replayed hit rates of decode in percent: of all steps, and of the first after a prompt."""
    rows = []
    settings: Any = {"kv_memory_bytes": 128 << 20, "prefetch": False}
    with tempfile.TemporaryDirectory() as scratch, opened(demo, cache_dir, **settings) as loaded:
        for name, arrivals in (("one by one", None), ("overlapping", ARRIVAL_STEPS)):
            path = Path(scratch) / f"{name}.trace"
            record(loaded, path, arrivals)
            trace = TraceReader(path)
            events, experts = list(trace), trace.header.experts_per_layer
            for share in SHARES:
                rows.append({"prompts": name} | replayed(events, experts, share))
                report.show("replayed: " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    return rows


def record(loaded: Loaded, path: Path, arrival_steps: int | None) -> None:
    """`arrival_steps` None: each prompt when the answer before it is whole."""
    waiting = [Running(n, loaded.tokenizer.encode(p), GREEDY) for n, p in enumerate(PROMPTS)]
    with TraceWriter(path, loaded.cache.spec) as writer:
        loaded.cache.record(writer)
        step = 0
        while waiting or not loaded.engine.idle:
            due = step % arrival_steps == 0 if arrival_steps else loaded.engine.idle
            if waiting and (due or loaded.engine.idle):
                loaded.engine.add(waiting.pop(0))
            loaded.engine.step()
            step += 1
        loaded.cache.record(None)


def replayed(
    events: Sequence[TraceEvent], experts: Sequence[int], share: float
) -> dict[str, float]:
    slots = int(sum(experts) * share)
    plain = [replace(event, routed=None) for event in events]
    row: dict[str, float] = {"slots": slots}
    for name, run in (("without", plain), ("with", events)):
        row[f"{name}_all"], row[f"{name}_first"] = hit_rates(run, experts, slots)
    ceiling = belady(events, experts, slots).hit_rate(Phase.DECODE)
    return row | {"belady_all": round(100 * ceiling, 1)}


def hit_rates(
    events: Sequence[TraceEvent], experts: Sequence[int], slots: int
) -> tuple[float, float]:
    """Of all steps of decode, and of the first ones after each prompt."""
    all_of, first = [0, 0], [0, 0]
    step, since = -1, 0
    for event, hits in replay_events(events, experts, slots, NextUse()):
        if event.step != step:
            since = 0 if event.phase is Phase.PREFILL else since + 1
            step = event.step
        for sums in (all_of, first)[: 2 if since <= FIRST_STEPS else 1]:
            sums[0] += hits * (event.phase is Phase.DECODE)
            sums[1] += len(event.experts) * (event.phase is Phase.DECODE)
    return round(100 * all_of[0] / all_of[1], 1), round(100 * first[0] / first[1], 1)


def live(demo: Path, cache_dir: Path, share: float) -> dict[str, Any]:
    """Engines that guess none, one or two experts take turns, step by step, with one prompt."""
    budget: Any = {"host_memory_bytes": int(720 * share) * BLOB, "kv_memory_bytes": 32 << 20}
    modes: dict[str, Any] = {
        "none": {"prefetch": False},
        "one": {"prefetch_experts": 1},
        "two": {"prefetch_experts": 2},
    }
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(opened(demo, cache_dir, **budget, **mode))
            for name, mode in modes.items()
        }
        params = replace(GREEDY, max_tokens=LIVE_STEPS + WARM_STEPS + 1)
        for loaded in engines.values():
            loaded.engine.add(Running(0, loaded.tokenizer.encode(PROMPTS[3]), params))
            for _ in range(WARM_STEPS):
                loaded.engine.step()
        before = {name: loaded.stats() for name, loaded in engines.items()}
        times = {name: list[tuple[float, float]]() for name in engines}
        for _ in range(LIVE_STEPS):
            for name, loaded in engines.items():
                wall_s, cpu_s = time.perf_counter(), time.thread_time()
                loaded.engine.step()
                took = time.perf_counter() - wall_s, time.thread_time() - cpu_s
                times[name].append(took)
        rows = {name: figures(before[name], engines[name], times[name]) for name in engines}
    for name, row in rows.items():
        report.show(f"{share:.0%} of the slots, guessing {name}: {row}")
    return {"share": share} | rows


def figures(
    before: EngineStats, loaded: Loaded, times: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """Milliseconds are per step. Guesses are counted from the start."""
    stats, steps = loaded.stats(), len(times)
    cache, guesses = stats.cache, stats.prefetch.layers[1:]
    stall_s = cache.decode_stall_s - before.cache.decode_stall_s
    row: dict[str, Any] = {
        "step_ms": round(1000 * statistics.median(wall_s for wall_s, _ in times), 1),
        "cpu_ms": round(1000 * statistics.median(cpu_s for _, cpu_s in times), 1),
        "stall_ms": round(1000 * stall_s / steps, 1),
        "loads": round((cache.loads - before.cache.loads) / steps, 1),
    }
    if guesses:
        recalls = [100 * layer.right / layer.asked for layer in guesses]
        chosen, right = sum(x.chosen for x in guesses), sum(x.chosen_right for x in guesses)
        row |= {
            "recall_percent": round(statistics.mean(recalls)),
            "recall_worst_layer": round(min(recalls)),
            "fetched_right_percent": round(100 * right / chosen),
            "used": cache.prefetches_used,
            "late": cache.prefetches_late,
            "wasted": cache.prefetches_wasted,
            "dropped": cache.prefetches_dropped,
            "read_again": cache.prefetch_rereads,
            "behind_ms": round(1000 * cache.prefetch_behind_s),
            "account_gain_ms": round(1000 * stats.prefetch.gain_s),
            "account_cost_ms": round(1000 * stats.prefetch.cost_s),
        }
    return row


if __name__ == "__main__":
    main()
