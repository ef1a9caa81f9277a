"""One turn of moestro in a process of its own: load, prefill, decode; one JSON line.

    python -m full.ours '{"model": "DIR", "cache": "DIR", "experts": "int8", "decode": 32}'

The benchmark starts it, so that every turn begins with the same memory and gives it all back.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

import moestro.cache
from engine_kit import opened
from moestro.cache import CacheStats, TraceWriter
from moestro.engine import SamplingParams
from moestro.engine.loader import Loaded
from moestro.engine.step.sequence import Sequence as Running

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
COUNTED = (
    "hits",
    "prefetch_hits",
    "misses",
    "loads",
    "loaded_bytes",
    "demand_bytes",
    "prefetch_bytes",
    "demand_read_s",
    "prefetch_read_s",
    "prefill_stall_s",
    "decode_stall_s",
)


@dataclass(frozen=True, slots=True)
class Task:
    """What one turn does. Where something is repeated, the figure is the median."""

    model: Path
    cache: Path
    experts: str = "int8"
    dense: str = "int8"
    prefill: int = 0  # tokens of a prompt whose time to the first token is measured
    decode: int = 0  # steps
    batch: int = 1  # sequences decoded together
    depth: int = 8  # tokens before the first decoded one
    repeats: int = 3
    warm: bool = True  # read every expert that has a slot before the clock starts
    host_memory: int | None = None  # bytes; None: the start decides
    kv_memory: int = 1 << 30
    chunk: int = 512  # tokens of one step
    threads: int = 1
    temperature: float = 0.0
    prompt: tuple[int, ...] = ()  # to be decoded after, instead of random ids
    prefetch: bool = True
    trace: Path | None = None  # of all that is asked of the cache, from its first event
    link_bytes_per_s: float | None = None  # an emulated link, and behind it …
    device_memory: int | None = None  # … a device with this many bytes of slots
    expert_density: float | None = None  # of the experts that a prompt keeps; None: routers choose
    settings: dict[str, Any] = field(default_factory=dict)  # of EngineConfig, as they are

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        fields = json.loads(text)
        for name in ("model", "cache", "trace"):
            fields[name] = Path(fields[name]) if fields.get(name) is not None else None
        return cls(**fields)


def run(task: Task) -> dict[str, Any]:
    began = time.perf_counter()
    with opened(
        task.model,
        task.cache,
        expert_format=task.experts,
        dense_format=task.dense,
        host_memory_bytes=task.host_memory,
        kv_memory_bytes=task.kv_memory,
        max_step_tokens=task.chunk,
        prefetch=task.prefetch,
        threads=task.threads,
        max_running=max(16, task.batch),
        **emulated(task),
        **task.settings,
    ) as loaded:
        gc.collect()  # as the server does when it is ready
        gc.freeze()
        plan = loaded.cache.plan
        writer = None if task.trace is None else TraceWriter(task.trace, loaded.cache.spec)
        loaded.cache.record(writer)
        found: dict[str, Any] = {
            "load_s": time.perf_counter() - began,
            "phases_s": loaded.load_s,
            "planned_bytes": loaded.plan.total_bytes,
            "slots": plan.slots,
            "slot_bytes": plan.slot_bytes,
            "experts": plan.total_experts,
        }
        if task.warm:
            fill(loaded)
        if task.prefill:
            found["prefill"] = _prefill(loaded, task)
        if task.decode:
            found["decode"] = _decode(loaded, task)
        found["rss_bytes"] = psutil.Process().memory_info().rss
        loaded.cache.record(None)
        if writer is not None:
            writer.close()
    return found


def emulated(task: Task) -> dict[str, Any]:
    """EngineConfig's fields for a device behind an emulated link; none without one."""
    if task.link_bytes_per_s is None:
        return {}
    spec = getattr(moestro.cache, "LinkSpec", None)
    if spec is None:
        raise SystemExit("this build has no emulated link")
    # Whatever is computed on the host crosses no link: the bar is about crossing it.
    return {
        "link": spec(task.link_bytes_per_s),
        "device_memory_bytes": task.device_memory,
        "host_compute": False,
    }


def fill(loaded: Loaded) -> None:
    """Ask for experts until all slots are taken, or until prompts ask for no new ones."""
    draw, used = torch.Generator().manual_seed(99), -1
    while used < loaded.cache.stats().slots_used < loaded.cache.plan.slots:
        used = loaded.cache.stats().slots_used
        ids = torch.randint(2, loaded.info.vocab_size, (256,), generator=draw).tolist()
        generate(loaded, [ids], ONE)


def _prefill(loaded: Loaded, task: Task) -> dict[str, Any]:
    """Seconds until the first token of a prompt of random ids; a new prompt each time."""
    seconds, cpu = [], []
    before = loaded.cache.stats()
    for number in range(task.repeats):
        prompt = random_ids(loaded, task.prefill, 1000 + number)
        began, began_cpu = time.perf_counter(), time.thread_time()
        generate(loaded, [prompt], ONE)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.thread_time() - began_cpu)
    spent = difference(before, loaded.cache.stats())
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "tok_s": task.prefill / statistics.median(seconds),
        "per_run": {name: value / task.repeats for name, value in spent.items()},
    }


def _decode(loaded: Loaded, task: Task) -> dict[str, Any]:
    """Seconds of the steps after the first token, all sequences together."""
    params = SamplingParams(
        task.decode + 1,
        temperature=task.temperature,
        seed=7,
        ignore_eos=True,
        expert_density=task.expert_density,
    )
    if task.warm:
        generate(loaded, [random_ids(loaded, task.depth, 1)], ONE)
    seconds, steps, cpu, totals = [], list[float](), [], dict.fromkeys(COUNTED, 0.0)
    for number in range(task.repeats):
        prompts = [
            list(task.prompt) or random_ids(loaded, task.depth, 100 * number + i)
            for i in range(task.batch)
        ]
        turn = generate(loaded, prompts, params)
        seconds.append(turn.seconds)
        steps += turn.steps_s
        cpu.append(turn.cpu_s)
        totals = {name: totals[name] + turn.counted[name] for name in COUNTED}
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "tok_s": task.batch * task.decode / statistics.median(seconds),
        "median_step_s": statistics.median(steps),
        "per_step": {name: value / task.repeats / task.decode for name, value in totals.items()},
    }


@dataclass(frozen=True, slots=True)
class Turn:
    """The steps of one generation after all its sequences had their first token."""

    steps_s: list[float]
    cpu_s: float  # of this thread
    counted: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.steps_s)


def generate(loaded: Loaded, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Turn:
    sequences = [Running(number, ids, params) for number, ids in enumerate(prompts)]
    for sequence in sequences:
        loaded.engine.add(sequence)
    while not all(sequence.generated_tokens for sequence in sequences):
        _step(loaded)
    before, times, began_cpu = loaded.cache.stats(), [time.perf_counter()], time.thread_time()
    while not loaded.engine.idle:
        _step(loaded)
        times.append(time.perf_counter())
    cpu_s = time.thread_time() - began_cpu
    steps = [after - earlier for earlier, after in pairwise(times)]
    return Turn(steps, cpu_s, difference(before, loaded.cache.stats()))


def _step(loaded: Loaded) -> None:
    for sequence, event in loaded.engine.step():
        if event.error is not None:
            raise RuntimeError(f"sequence {sequence.number}: {event.error}")


def difference(before: CacheStats, after: CacheStats) -> dict[str, float]:
    return {name: getattr(after, name) - getattr(before, name) for name in COUNTED}


def random_ids(loaded: Loaded, tokens: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, loaded.info.vocab_size, (tokens,), generator=draw).tolist()
    return found


if __name__ == "__main__":
    print(json.dumps(run(Task.from_json(sys.argv[1]))))
