"""P8: the second start of the 7 B geometry: time to the first token, and bytes read for it."""

import os
import time
from pathlib import Path
from typing import Any

import psutil
import report

from server_process import ServerProcess

from .bars import Bar
from .bench import Bench, begin, finish
from .memgroup import forget_pages

PROMPT = [101, 2003, 30007, 4011, 50001, 6007, 17, 8009]
FIRST_TOKEN_S = 10.0
READ_SHARE = 1.1  # of what is needed: file systems read whole pages, and ahead
FORMAT = "int8"


def run(bench: Bench) -> None:
    begin(f"P8 second start, {FORMAT}, prompt of {len(PROMPT)} tokens")
    bench.only(packs=(FORMAT,))
    model = bench.checkpoint()
    bench.ours(experts=FORMAT, dense=FORMAT, decode=1, repeats=1, warm=False)  # the first start
    turns = []
    for _ in range(max(3, bench.turns)):
        turns.append(start(bench, model))
        report.show(f"  turn: {turns[-1]}")
    warm = start(bench, model, cold=False)
    report.show(f"  with the checkpoint in the page cache: {warm['first_token_s']:.1f} s")
    middle = sorted(turns, key=lambda turn: turn["first_token_s"])[len(turns) // 2]
    disk_s = middle["needed_bytes"] / disk_rate(model)
    report.show(f"  ceiling: reading what is needed takes {disk_s:.1f} s here")
    bench.hold(Bar("P8 first token", middle["first_token_s"], FIRST_TOKEN_S, "s", at_most=True))
    share = middle["read_bytes"] / middle["needed_bytes"]
    bench.hold(Bar("P8 bytes read over bytes needed", share, READ_SHARE, "x", at_most=True))
    finish("p8", bench, {"turns": turns, "warm": warm, "disk_s": disk_s})


def start(bench: Bench, model: Path, *, cold: bool = True) -> dict[str, Any]:
    """From the command to the first token of a server; cold: its files are in no page cache."""
    if cold:
        forget_pages(model, bench.cache(FORMAT))
    flags = [
        "--expert-format",
        FORMAT,
        "--dense-format",
        FORMAT,
        "--cache-dir",
        str(bench.cache(FORMAT)),
    ]
    flags += ["--host-memory", str(bench.all_experts(FORMAT)), "--threads", "1"]
    began = time.perf_counter()
    server = ServerProcess(str(model), *flags)
    try:
        process = psutil.Process(server.process.pid)
        server.wait_ready()
        ready_s = time.perf_counter() - began
        reply = server.complete(PROMPT, max_tokens=1)
        first_token_s = time.perf_counter() - began
        reply.raise_for_status()
        read_bytes = process.io_counters().read_bytes
        loaded = expert_bytes(server.metrics())
        return {
            "first_token_s": first_token_s,
            "ready_s": ready_s,
            "read_bytes": read_bytes,
            "needed_bytes": loaded + dense_bytes(bench, model),
            "experts_bytes": loaded,
            "peak_rss_bytes": server.peak_rss_bytes,
        }
    finally:
        server.process.terminate()
        server.wait_exit()


def dense_bytes(bench: Bench, model: Path) -> int:
    """Of the dense part, as the first start has kept it."""
    (kept,) = bench.cache(FORMAT).glob(f"packs/{model.name}-*/dense.{FORMAT}")
    return kept.stat().st_size


def expert_bytes(metrics: str) -> int:
    """What the server says it has read from the pack, demanded or guessed."""
    return sum(
        int(float(line.rsplit(" ", 1)[1]))
        for line in metrics.splitlines()
        if line.startswith("moestro_expert_transfer_bytes_total{") and "disk" in line
    )


def disk_rate(model: Path) -> float:
    """Bytes per second of this disk right now, past the page cache."""
    path = model / "experts-00.safetensors"
    forget_pages(path)
    began, count = time.perf_counter(), 0
    handle = os.open(path, os.O_RDONLY)
    try:
        while chunk := os.read(handle, 8 << 20):
            count += len(chunk)
    finally:
        os.close(handle)
    return count / (time.perf_counter() - began)
