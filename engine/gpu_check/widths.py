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
                row = _measure(bench, shape, model, expert_format, share, known_bytes)
                rows.append(row)
                found.lines.append(_speed_line(row))
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
    expert_format: str,
    share: float,
    known_bytes: int | None,
) -> dict[str, Any]:
    """`known_bytes`: of an expert in this format, once a start has told."""
    least = 2 * shape.experts_per_token  # of one token, while another is on its way
    slots = max(round(share * shape.layers * shape.experts), least)
    # a slot has a head and is filled up: one in 64 covers it
    slot_bytes = shape.expert_bytes + shape.expert_bytes // 64 + MIB // 64
    host_bytes = shape.layers * shape.experts * slot_bytes + HOST_SLACK_BYTES
    device_bytes = slots * (known_bytes or slot_bytes)
    config = bench.config(model, expert_format, device_bytes, host_bytes)
    if not bench.imagined:
        torch.cuda.reset_peak_memory_stats(bench.device)
    began_s = time.perf_counter()
    with bench.opened(config) as opened:
        row: dict[str, Any] = {
            "expert_format": expert_format,
            "share": share,
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
        return row | {"memory": _memory(bench, opened)}


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
    memory = row["memory"]
    planned = memory["planned_bytes"]
    if imagined:
        return [f"  operations {row['operations_per_layer']:.0f} a layer, GPU: not run"]
    on_device = sum(count for name, count in planned.items() if name.startswith("device"))
    return [
        f"  launches {row['launches_per_layer']:.0f}, copies {row['copies_per_layer']:.1f}, host"
        f" {row['host_us_per_layer']:.0f} us a layer, GPU busy {_share(row['gpu_busy_share'])},"
        f" attention {', '.join(row['attention']) or '?'}",
        f"  GPU memory reserved {human_bytes(memory['peak_reserved_bytes'])}, in use there"
        f" {human_bytes(memory['device_used_bytes'])}, planned {human_bytes(on_device)}; RSS"
        f" {human_bytes(memory['resident_set_bytes'])}, planned"
        f" {human_bytes(sum(planned.values()) - on_device)}",
    ]


def _share(share: float | None) -> str:
    return "?" if share is None else f"{share:.0%}"
