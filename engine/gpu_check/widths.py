"""Layers of real models' widths, random weights: how fast a token is with so many in slots.

Every token's experts are near uniform, so that a share of slots is about the share of hits: text
asks for some experts more often, and finds more of them.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from moestro.cache import CacheStats, human_bytes
from moestro.engine.facts import MIB

from .bench import IMAGINED_MODEL_BYTES, Bench, Opened
from .found import Found
from .geometry import VOCAB_SIZE, Geometry, fitted
from .launches import Profiled, profiled
from .random_model import write_model
from .stream import Stream, stream

# A model lies in memory while it is written, then in the host tier, and twice on disk.
RAM_SHARE, DISK_SHARE, DEVICE_SHARE = 0.25, 0.3, 0.6
HOST_SLACK_BYTES = 256 * MIB
WARM_TOKENS = 4


def widths(bench: Bench, found: Found, real: Geometry) -> None:
    shape = fitted(real, _room_bytes(bench), bench.sizes.most_layers)
    found.facts["model"] = shape.words
    found.lines.append(f"{shape.words}, bf16, vocabulary {VOCAB_SIZE}: {_scaled(shape, real)}")
    rows = found.facts["rows"] = list[dict[str, Any]]()
    with _written(bench, shape) as model:
        for expert_format in bench.sizes.formats:
            known_bytes = None
            for share in bench.sizes.shares:
                if rows and bench.left_s() <= 0:
                    found.lines.append(f"{expert_format}, {share:.0%}: not run, no time was left")
                    continue
                row: dict[str, Any] = {"expert_format": expert_format, "share": share}
                rows.append(row)
                _measure(bench, shape, model, row, known_bytes)
                found.lines.append(_speed_line(row))
                found.problems += broken_promises(row)
                if known_bytes is None:
                    found.lines += _detail_lines(row, bench.imagined)
                known_bytes = row["expert_bytes"]


def _room_bytes(bench: Bench) -> int:
    rooms = [
        bench.sizes.model_bytes,
        int(RAM_SHARE * psutil.virtual_memory().available),
        int(DISK_SHARE * shutil.disk_usage(bench.scratch).free),
    ]
    if bench.imagined:
        rooms.append(IMAGINED_MODEL_BYTES)
    else:
        free_bytes, _ = torch.cuda.mem_get_info(bench.device)
        rooms.append(int(DEVICE_SHARE * free_bytes))
    return min(rooms)


def _scaled(shape: Geometry, real: Geometry) -> str:
    layers = f"{shape.layers} of {real.layers} layers"
    if shape.experts == real.experts:
        return f"{layers}, all experts"
    return f"{layers}, {shape.experts} of {real.experts} experts, as more do not fit here"


@contextmanager
def _written(bench: Bench, shape: Geometry) -> Iterator[Path]:
    """The model's folder; afterwards it and its packs are gone."""
    model = bench.scratch / shape.name.replace(" ", "-")
    try:
        yield write_model(shape, model)
    finally:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(bench.scratch / "cache", ignore_errors=True)


def _measure(
    bench: Bench,
    shape: Geometry,
    model: Path,
    row: dict[str, Any],
    known_bytes: int | None,
) -> None:
    """Into `row`, as it goes. `known_bytes`: of an expert in this format, once a start has told."""
    least = 2 * shape.experts_per_token  # of one token, while another is on its way
    slots = max(round(row["share"] * shape.layers * shape.experts), least)
    # a slot has a head and is filled up: one in 64 covers it
    slot_bytes = shape.expert_bytes + shape.expert_bytes // 64 + MIB // 64
    host_bytes = shape.layers * shape.experts * slot_bytes + HOST_SLACK_BYTES
    device_bytes = slots * (known_bytes or slot_bytes)
    config = bench.config(model, row["expert_format"], device_bytes, host_bytes)
    if not bench.imagined:
        torch.cuda.reset_peak_memory_stats(bench.device)
    began_s = time.perf_counter()
    with bench.opened(config) as opened:
        row |= {
            "slots": opened.cache.plan.slots,
            "experts": opened.cache.plan.total_experts,
            "expert_bytes": opened.info.expert_bytes,
            "start_s": time.perf_counter() - began_s,
        }
        draw = torch.Generator().manual_seed(1)
        sizes = bench.sizes
        prompt = torch.randint(256, (sizes.prompt_tokens,), generator=draw).tolist()
        most = WARM_TOKENS + sizes.decode_tokens + sizes.profiled_tokens
        with stream(opened, prompt, most) as running:
            began_s = time.perf_counter()
            running.advance(prompt)
            row["prompt_s"] = time.perf_counter() - began_s
            _decode(running, WARM_TOKENS, draw)
            row |= _timed(bench, opened, running, draw)
            row |= _profiled(bench, opened, running, draw)
        row["memory"] = _memory(bench, opened)


def _decode(running: Stream, tokens: int, draw: torch.Generator) -> None:
    for token in torch.randint(256, (tokens,), generator=draw).tolist():
        running.advance([token])


def _timed(bench: Bench, opened: Opened, running: Stream, draw: torch.Generator) -> dict[str, Any]:
    tokens, layers = bench.sizes.decode_tokens, opened.info.num_layers
    before = opened.cache.stats()
    began_s = time.perf_counter()
    _decode(running, tokens, draw)
    took_s = time.perf_counter() - began_s
    after = opened.cache.stats()
    return {
        "decode_tokens": tokens,
        "decode_tokens_per_s": tokens / took_s,
        "layer_us": 1e6 * took_s / tokens / layers,
        "hit_share": _hit_share(before, after),
        "moved_bytes_per_token": (after.loaded_bytes - before.loaded_bytes) / tokens,
        "stall_share": (after.decode_stall_s - before.decode_stall_s) / took_s,
    }


def _hit_share(before: CacheStats, after: CacheStats) -> float:
    found = after.hits + after.prefetch_hits - before.hits - before.prefetch_hits
    return found / max(1, after.lookups - before.lookups)


def _profiled(
    bench: Bench, opened: Opened, running: Stream, draw: torch.Generator
) -> dict[str, Any]:
    tokens, layers = bench.sizes.profiled_tokens, opened.info.num_layers

    def work() -> None:
        _decode(running, tokens, draw)
        bench.wait()

    seen = profiled(work, on_gpu=not bench.imagined)
    return {
        "profile": seen.as_facts() | {"tokens": tokens},
        "operations_per_layer": seen.operations / tokens / layers,
        "launches_per_layer": _per(seen.launches, tokens * layers),
        "copies_per_layer": _per(seen.copies, tokens * layers),
        "gpu_busy_share": seen.busy_share,
        "host_us_per_layer": _host_us(seen, tokens * layers),
        "attention": seen.attention,
    }


def _per(count: int | None, turns: int) -> float | None:
    return None if count is None else count / turns


def _host_us(seen: Profiled, turns: int) -> float | None:
    """What the host did not wait, the profiler's own work included."""
    return None if seen.waited_us is None else (seen.span_us - seen.waited_us) / turns


def _memory(bench: Bench, opened: Opened) -> dict[str, Any]:
    """What was taken against what the plan says."""
    found: dict[str, Any] = {
        "planned_bytes": opened.plan.parts(),
        "resident_set_bytes": psutil.Process().memory_info().rss,
    }
    if not bench.imagined:
        free_bytes, total_bytes = torch.cuda.mem_get_info(bench.device)
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(bench.device)
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(bench.device)
        found["device_used_bytes"] = total_bytes - free_bytes
    return found


def _speed_line(row: dict[str, Any]) -> str:
    return (
        f"{row['expert_format']}, {row['slots']} of {row['experts']} in slots:"
        f" {row['decode_tokens_per_s']:.1f} tok/s, {row['layer_us']:.0f} us a layer, hits"
        f" {row['hit_share']:.0%}, stalls {row['stall_share']:.0%}"
    )


def _detail_lines(row: dict[str, Any], imagined: bool) -> list[str]:
    return [_profile_line(row)] if imagined else [_profile_line(row), _memory_line(row["memory"])]


def _profile_line(row: dict[str, Any]) -> str:
    operations = f"  operations {row['operations_per_layer']:.0f} a layer"
    if row["launches_per_layer"] is None:
        return f"{operations}; launches, GPU busy: not run (no GPU that the profiler sees)"
    return (
        f"{operations}, launches {row['launches_per_layer']:.0f}, copies"
        f" {row['copies_per_layer']:.1f}, host {row['host_us_per_layer']:.0f} us, GPU busy"
        f" {row['gpu_busy_share']:.0%}, attention {', '.join(row['attention']) or '?'}"
    )


def broken_promises(row: dict[str, Any]) -> list[str]:
    """Where the GPU's memory was not enough as planned."""
    memory = row["memory"]
    taken, planned = memory.get("peak_reserved_bytes", 0), _on_device(memory)
    if taken <= planned:
        return []
    return [
        f"{row['expert_format']}, {row['slots']} slots: {human_bytes(taken)} of the GPU's memory"
        f" were taken, {human_bytes(planned)} planned"
    ]


def _on_device(memory: dict[str, Any]) -> int:
    planned: dict[str, int] = memory["planned_bytes"]
    return sum(count for name, count in planned.items() if name.startswith("device"))


def _memory_line(memory: dict[str, Any]) -> str:
    planned, on_device = memory["planned_bytes"], _on_device(memory)
    return (
        f"  GPU memory reserved {human_bytes(memory['peak_reserved_bytes'])}, in use there"
        f" {human_bytes(memory['device_used_bytes'])}, planned {human_bytes(on_device)}; RSS"
        f" {human_bytes(memory['resident_set_bytes'])}, planned"
        f" {human_bytes(sum(planned.values()) - on_device)}"
    )
