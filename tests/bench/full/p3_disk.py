"""P3: the 7 B geometry in a memory group of 2.2 GB: experts on disk, one thread.

At half the depth the group has room for as large a share of the experts: what has no depth
(interpreter, vocabulary, a step's workspace) is there as a whole, the rest is half as large.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import report

from moestro.cache import NextUse, Phase, Replayed, TraceReader, belady, replay

from .bars import Bar, Link, bound_s, medians, ratio_bar, share_bar
from .bench import Bench, TurnFailed, begin, finish
from .disk import read_bytes_per_s, readers_of
from .maker import make_random
from .memgroup import NoMemoryGroup, forget_pages, memory_group
from .processes import HERE, last_json
from .processes import run as run_process
from .prompts import write_prompt

GROUP_BYTES = 2_200_000_000
DEPTHLESS_BYTES = 800_000_000  # of them
EXPERTS, DENSE = "int4", "int8"
DECODE, PREFILL = 32, 256
KV_BYTES = 96 << 20
LLAMA_BAR, BOUND_PERCENT, FASTLLM_BAR, ACCELERATE_BAR = 1.4, 85.0, 1.5, 20.0
REPLAY_SHARE = 1.02
FASTLLM_CACHE_BYTES = 600_000_000  # what its dense half-precision weights leave of the group
OFFLOADED_TOKENS = 2  # of accelerate: each moves every expert


def run(bench: Bench) -> None:
    group = f"{group_bytes(bench) / 1e9:.1f} GB"
    begin(f"P3 in a memory group of {group}, {EXPERTS} experts, {DENSE} dense")
    report.show(f"  the kernel reads ahead of every page fault by {read_ahead()}: mmap hangs on it")
    results: dict[str, Any] = {}
    try:
        with memory_group(1 << 30):
            pass
    except NoMemoryGroup as error:
        bench.without("P3", f"no memory group can be made here: {error}")
        finish("p3", bench, results)
        return
    for variant in ("random", "skewed"):
        results[variant] = one_variant(bench, variant)
        bench.only()
        if variant != "random":
            bench.drop_checkpoint(variant)
    for name, against in (("fastllm", against_fastllm), ("accelerate", against_accelerate)):
        bench.only()
        results[name] = attempt(bench, f"P3 against {name}", against)
    finish("p3", bench, results)


def group_bytes(bench: Bench) -> int:
    return int(DEPTHLESS_BYTES + (GROUP_BYTES - DEPTHLESS_BYTES) * bench.shape.depth)


def read_ahead() -> str:
    """Of each disk; 128 KiB is usual. The larger, the more of a small group one fault takes."""
    found = {
        path.parents[1].name: int(path.read_text())
        for path in Path("/sys/block").glob("*/queue/read_ahead_kb")
    }
    return ", ".join(f"{size} KiB ({disk})" for disk, size in found.items() if "loop" not in disk)


def attempt(bench: Bench, what: str, work: Callable[[Bench], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work(bench)
    except TurnFailed as error:
        bench.without(what, error)
        return {}


def one_variant(bench: Bench, variant: str) -> dict[str, Any]:
    """Ours and llama.cpp in turn, then ours against what is possible."""
    turns: list[dict[str, float | None]] = []
    seen: list[dict[str, Any]] = []
    try:
        bench.pair(EXPERTS, "q4_0", variant)
        free = bench.ours(variant, experts=EXPERTS, dense=DENSE, decode=DECODE, prefill=PREFILL)
        for _ in range(bench.turns):
            seen.append(ours_in_group(bench, variant))
            row: dict[str, float | None] = {
                "ours": seen[-1]["decode"]["tok_s"],
                "ours_prefill": seen[-1]["prefill"]["tok_s"],
            }
            if bench.llama.available:
                row |= llama_in_group(bench, variant)
            turns.append(row)
            report.show(f"  turn {variant}: {row}")
    except TurnFailed as error:
        bench.without(f"P3 {variant}", error)
        return {}
    found = medians(turns)
    if "peer" in found:
        what = f"P3 {variant} decode against llama.cpp Q4_0 mmap ({found['peer']:.2f} tok/s)"
        bench.hold(ratio_bar(what, found["ours"], found["peer"], LLAMA_BAR))
    held = sorted(seen, key=lambda turn: turn["decode"]["tok_s"])[len(seen) // 2]
    return found | against_bound(bench, variant, held, free)


def ours_in_group(bench: Bench, variant: str, **fields: Any) -> dict[str, Any]:
    model = bench.checkpoint(variant)
    forget_pages(model, bench.cache(EXPERTS))
    trace = bench.shop.path("p3.trace")
    settings: dict[str, Any] = {
        "experts": EXPERTS,
        "dense": DENSE,
        "host_memory": None,
        "kv_memory": int(KV_BYTES * bench.shape.depth),
        "prefill": PREFILL,
        "decode": DECODE,
        "repeats": 1,
        "chunk": PREFILL,
        "temperature": 1.0,
        "warm": False,
        "trace": trace,
    }
    with memory_group(group_bytes(bench)) as group:
        turn = bench.ours(variant, turn={"group": group}, **settings | fields)
    turn["trace"] = trace
    return turn


def llama_in_group(bench: Bench, variant: str) -> dict[str, float | None]:
    model = bench.gguf("q4_0", variant)
    prompt = write_prompt(bench.shop.path("prompt.txt"), bench.checkpoint(variant), PREFILL)
    forget_pages(model)
    extra = ("--no-repack", "--load-mode", "mmap")
    with memory_group(group_bytes(bench)) as group:
        speeds = bench.llama.complete(model, prompt, DECODE, extra, group=group)
    return {"peer": speeds.decode, "peer_prefill": speeds.prefill}


def against_bound(
    bench: Bench, variant: str, held: dict[str, Any], free: dict[str, Any]
) -> dict[str, Any]:
    """Seconds per token against max(compute, missing bytes / the disk), and the replay.

    The disk is what as many readers as ours get of it now, one piece as large as a slot at a time.
    """
    step = held["decode"]["per_step"]
    pack = max(bench.cache(EXPERTS).rglob("*"), key=lambda path: path.stat().st_size)
    disk = Link(read_bytes_per_s(pack, held["slot_bytes"], readers_of(held["slot_bytes"])))
    compute_s = free["decode"]["median_step_s"]
    taken_s = held["decode"]["seconds"][0] / DECODE
    least_s = bound_s(compute_s, step["misses"] * held["slot_bytes"], disk)
    report.show(
        f"  {variant}: {held['slots']} slots of {held['experts']}, step {1000 * taken_s:.0f} ms,"
        f" compute {1000 * compute_s:.0f} ms, {step['loaded_bytes'] / 1e6:.0f} MB per token at"
        f" {disk.bytes_per_s / 1e6:.0f} MB/s"
    )
    bench.hold(share_bar(f"P3 {variant} decode", 1 / taken_s, 1 / least_s, BOUND_PERCENT))
    read = held["prefill"]["per_run"]
    prompt_s = held["prefill"]["seconds"][0]
    prompt_least_s = bound_s(free["prefill"]["seconds"][0], read["loaded_bytes"], disk)
    name = f"P3 {variant} prefill"
    bench.hold(share_bar(name, 1 / prompt_s, 1 / prompt_least_s, BOUND_PERCENT))
    return {"held": strip(held), "free": strip(free), **against_replay(bench, variant, held)}


def against_replay(bench: Bench, variant: str, held: dict[str, Any]) -> dict[str, Any]:
    trace = TraceReader(held["trace"])
    events, experts = list(trace), trace.header.experts_per_layer
    replayed = replay(events, experts, held["slots"], NextUse())
    best = belady(events, experts, held["slots"])
    half = replay(events, experts, sum(experts) // 2, NextUse())
    rates = {
        "policy": replayed.hit_rate(Phase.DECODE),
        "belady": best.hit_rate(Phase.DECODE),
        "policy_at_half": half.hit_rate(Phase.DECODE),
    }
    report.show(f"  {variant}: hit rates of decode, replayed: {rates}")
    wanted = decode_misses(replayed) * held["slot_bytes"] / DECODE
    got = held["decode"]["per_step"]["loaded_bytes"]
    name = f"P3 {variant} bytes per token over the replay's"
    bench.hold(Bar(name, got / wanted, REPLAY_SHARE, "x", at_most=True))
    return {"hit_rates": rates, "bytes_per_token": got, "replayed_bytes_per_token": wanted}


def decode_misses(replayed: Replayed) -> int:
    return sum(layer.misses for layer in replayed.decode)


def strip(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: turn[name] for name in ("slots", "slot_bytes", "decode", "prefill")}


def against_fastllm(bench: Bench) -> dict[str, Any]:
    """Its disk mode keeps the checkpoint's bytes, so ours do too, with the same cache beside."""
    python = bench.peers / "fastllm" / "bin" / "python"
    if not python.exists():
        raise TurnFailed("fastllm is not installed (bench_peers.sh)")
    shape = replace(bench.shape, family="qwen3_moe")
    twin = bench.checkpoint()
    model = make_random(bench.shop.path("qwen3-moe-random"), shape, twin)
    cache_bytes = int(FASTLLM_CACHE_BYTES * shape.depth)
    task = {"model": str(model), "cache": cache_bytes, "vocab": shape.vocab}
    task |= {"prefill": 16, "decode": DECODE}
    turns: list[dict[str, float | None]] = []
    for _ in range(bench.turns):
        forget_pages(model)
        with memory_group(group_bytes(bench)) as group:
            command: list[str | Path] = [python, "-P", HERE / "fastllm_turn.py", json.dumps(task)]
            peer = last_json(run_process(command, group=group).stdout)
        same = {"experts": "native", "host_memory": cache_bytes, "prefill": 16}
        ours = ours_in_group(bench, "random", model=model, **same)
        turns.append({"ours": ours["decode"]["tok_s"], "peer": peer["decode_tok_s"]})
        report.show(f"  turn fastllm: {turns[-1]}")
    bench.shop.drop(model)
    found = medians(turns)
    what = f"P3 decode against fastllm's disk mode, bf16 ({found['peer']:.2f} tok/s)"
    bench.hold(ratio_bar(what, found["ours"], found["peer"], FASTLLM_BAR))
    return found


def against_accelerate(bench: Bench) -> dict[str, Any]:
    """Stock disk offload: it writes the joined experts anew, then moves all of them per token."""
    offload = bench.shop.path("offload")
    try:
        with memory_group(group_bytes(bench)) as group:
            turn = bench.stock(
                {"group": group},
                offload=str(offload),
                memory=group_bytes(bench) // 3,
                decode=OFFLOADED_TOKENS,
                repeats=1,
            )
    finally:
        bench.shop.drop(offload)
    ours = ours_in_group(bench, "random")["decode"]["tok_s"]
    what = f"P3 decode against accelerate's disk offload ({turn['decode_tok_s']:.3f} tok/s)"
    bench.hold(ratio_bar(what, ours, turn["decode_tok_s"], ACCELERATE_BAR))
    return {"ours": ours, "peer": turn["decode_tok_s"]}
