"""P1: decode of the 7 B geometry, all in RAM, one token at a time, on one thread and on two."""

from pathlib import Path
from typing import Any

import report

from .bars import Bar, decode_bytes, gain, medians, ratio_bar
from .bench import Bench, TurnFailed, begin, finish
from .streams import Streams

TOKENS = 32
PEERS = {"int8": ("q8_0", "Q8_0"), "int4": ("q4_0", "Q4_0")}
DENSE = {"int8": "int8", "int4": "int8"}  # beside the experts' format
LLAMA_BAR, MEMORY_PERCENT = 1.05, 60.0
THREADS = 2
GAIN_BAR, LLAMA_TWO_BAR = 0.9, 1.0
STOCK_BAR = 2.3
STOCK_TOKENS = 16
STOCK_IMPLEMENTATIONS = ("grouped_mm", "eager")
Row = dict[str, float | None]


def run(bench: Bench) -> None:
    begin("P1 decode, all in RAM, batch 1")
    results: dict[str, Any] = {}
    for name in PEERS:
        results[name] = one_format(bench, name)
    against_stock(bench, results["int8"].get("ours", 0.0), results)
    finish("p1", bench, results)


def one_format(bench: Bench, name: str) -> dict[str, float]:
    """Alternating turns of the memory, ours and llama.cpp; every bar of one format."""
    turns: list[Row] = []
    try:
        model = bench.pair(name, PEERS[name][0])
        for _ in range(bench.turns):
            turns.append(turn(bench, name, model))
            report.show(f"  turn {name}: {shown(turns[-1])}")
    except TurnFailed as error:
        bench.without(f"P1 {name}", error)
    found = medians(turns)
    if found:
        judge(bench, name, found)
    return found


def turn(bench: Bench, name: str, model: Path | None) -> Row:
    """Everybody once, on one thread and on two, within a minute or two of each other."""
    row = Row()
    for threads in (1, THREADS):
        ends = "" if threads == 1 else "_two"
        memory = bench.streams(threads)
        ours = bench.ours(
            experts=name, dense=DENSE[name], decode=TOKENS, repeats=2, threads=threads
        )
        row[f"ours{ends}"] = speed = ours["decode"]["tok_s"]
        row[f"memory{ends}"] = memory.best
        row[f"bytes{ends}"] = moved = decode_bytes(bench.shape, ours["slot_bytes"], DENSE[name])
        row[f"share{ends}"] = speed * moved / memory.best
        if model is not None:
            speeds = bench.llama.bench(model, decode=TOKENS, repeats=2, threads=threads)
            row[f"peer{ends}"] = speeds.decode
        say_memory(name, memory)
    return row


def say_memory(name: str, memory: Streams) -> None:
    report.show(
        f"  memory beside {name}, threads {memory.threads}: {memory.best / 1e9:.1f} GB/s"
        f" ({memory.best_way})"
    )


def shown(row: Row) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in row.items() if value is not None}


def judge(bench: Bench, name: str, found: dict[str, float]) -> None:
    label = PEERS[name][1]
    if "peer" in found:
        what = f"P1 decode {name} against llama.cpp {label} ({found['peer']:.2f} tok/s)"
        bench.hold(ratio_bar(what, found["ours"], found["peer"], LLAMA_BAR))
        what = f"P1 decode {name}, {THREADS} threads, against llama.cpp {label}"
        what += f" ({found['peer_two']:.2f} tok/s)"
        bench.hold(ratio_bar(what, found["ours_two"], found["peer_two"], LLAMA_TWO_BAR))
    else:
        bench.without(f"P1 {name} against llama.cpp", "it is not installed (bench_peers.sh)")
    what = f"P1 decode {name} ({found['ours']:.2f} tok/s, {found['bytes'] / 1e6:.0f} MB per token)"
    bench.hold(Bar(what, 100 * found["share"], MEMORY_PERCENT, "% of the memory's speed"))
    ours = gain(found["ours"], found["ours_two"])
    memory = gain(found["memory"], found["memory_two"])
    what = f"P1 decode {name}, gain of {THREADS} threads ({ours:.2f} x, memory {memory:.2f} x)"
    bench.hold(ratio_bar(what, ours, memory, GAIN_BAR))


def against_stock(bench: Bench, ours: float, results: dict[str, Any]) -> None:
    """bf16, the better of its implementations."""
    found = {}
    for name in STOCK_IMPLEMENTATIONS:
        try:
            turn = bench.stock(experts=name, decode=STOCK_TOKENS, repeats=bench.turns)
        except TurnFailed as error:
            bench.without(f"P1 against stock {name}", error)
            continue
        found[name] = turn["decode_tok_s"]
        report.show(f"  stock bf16 {name}: {found[name]:.2f} tok/s")
    results["stock"] = found
    if found and ours:
        best = max(found.values())
        what = f"P1 decode int8 against stock bf16 ({best:.2f} tok/s)"
        bench.hold(ratio_bar(what, ours, best, STOCK_BAR))
