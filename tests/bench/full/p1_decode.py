"""P1: decode of the 7 B geometry, all in RAM, one token at a time, one thread."""

from typing import Any

import report

from .bars import medians, ratio_bar
from .bench import Bench, TurnFailed, begin, finish

TOKENS = 32
FORMATS = ("int8", "int4")
PEERS = {"int8": ("q8_0", "Q8_0", 1.0), "int4": ("q4_0", "Q4_0", 0.9)}
STOCK_BAR = 2.3
STOCK_TOKENS = 16
STOCK_IMPLEMENTATIONS = ("grouped_mm", "eager")


def run(bench: Bench) -> None:
    begin("P1 decode, all in RAM, batch 1")
    ceiling = bench.bound(1).memory_bytes_per_s / bench.shape.active_numbers
    results: dict[str, Any] = {"one_byte_ceiling_tok_s": ceiling}
    report.show(f"  ceiling at one byte per weight: {ceiling:.1f} tok/s, at half a byte twice that")
    best = 0.0
    for number, name in enumerate(FORMATS):
        found = results[name] = against_llama(bench, name)
        if "ours" in found:
            best = max(best, found["ours"]) if number == 0 else best
            share = 100 * found["ours"] / (ceiling * (1 if name == "int8" else 2))
            report.show(f"  {name}: {found['ours']:.2f} tok/s, {share:.0f} % of the ceiling")
    against_stock(bench, best, results)
    finish("p1", bench, results)


def against_llama(bench: Bench, name: str) -> dict[str, float]:
    kind, label, wanted = PEERS[name]
    turns: list[dict[str, float | None]] = []
    try:
        for _ in range(bench.turns):
            turn = bench.ours(experts=name, dense=name, decode=TOKENS, repeats=2)
            row: dict[str, float | None] = {"ours": turn["decode"]["tok_s"]}
            if bench.llama.available:
                speeds = bench.llama.bench(bench.gguf(kind), decode=TOKENS, repeats=2)
                row["peer"] = speeds.decode
            turns.append(row)
            report.show(f"  turn {name}: {row}")
    except TurnFailed as error:
        bench.without(f"P1 {name}", error)
    found = medians(turns)
    if "peer" in found:
        what = f"P1 decode {name} against llama.cpp {label} ({found['peer']:.2f} tok/s)"
        bench.hold(ratio_bar(what, found["ours"], found["peer"], wanted))
    elif turns:
        bench.without(f"P1 {name} against llama.cpp", "it is not installed (bench_peers.sh)")
    return found


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
