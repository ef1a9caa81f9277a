"""P2: a prompt of 512 tokens through the 7 B geometry, int8 and int4, all in RAM, one thread."""

from pathlib import Path
from typing import Any

import report

from .bars import medians, ratio_bar, share_bar
from .bench import Bench, TurnFailed, begin, finish

TOKENS = 512
# What lies on the disk together: one pack and one GGUF. Each pair differs from the one before in
# one of the two, and Q4_0 is made of Q8_0.
PAIRS = (("int8", "q8_0"), ("int4", "q8_0"), ("int4", "q4_0"), ("int8", "q4_0"))
DENSE = {"int8": "int8", "int4": "int8"}
# The kernels' rate is that of int8's products, whatever the format: int4 is held to the same.
LLAMA_BAR, STOCK_BAR, KERNEL_PERCENT = 3.0, 1.3, 80.0
STOCK_FLAG = "avx512_bf16"  # without it stock's products are too slow to be a rival
STOCK_IMPLEMENTATIONS = ("grouped_mm", "eager")


def run(bench: Bench) -> None:
    begin(f"P2 prefill of {TOKENS} tokens, int8 and int4, all in RAM")
    results: dict[str, Any] = {}
    pairs = PAIRS if bench.llama.available else (("int8", ""), ("int4", ""))
    for experts, kind in pairs:
        name = f"{experts} beside {kind}" if kind else experts
        results[name] = found = one_pair(bench, experts, kind)
        if "peer" in found:
            what = f"P2 prefill {experts} against llama.cpp {kind.upper()}"
            what += f" ({found['peer']:.1f} tok/s)"
            bench.hold(ratio_bar(what, found["ours"], found["peer"], LLAMA_BAR))
    if not bench.llama.available:
        bench.without("P2 against llama.cpp", "it is not installed (bench_peers.sh)")
    against_stock(bench, results)
    finish("p2", bench, results)


def one_pair(bench: Bench, experts: str, kind: str) -> dict[str, float]:
    """Alternating turns of the ceiling, ours and, where `kind` is not empty, llama.cpp."""
    turns: list[dict[str, float | None]] = []
    try:
        model = bench.pair(experts, kind)
        for _ in range(bench.turns):
            turns.append(turn(bench, experts, model))
            report.show(f"  turn {experts} {kind}: {turns[-1]}")
    except TurnFailed as error:
        bench.without(f"P2 {experts} {kind}".rstrip(), error)
    found = medians(turns)
    if "ours" in found:
        name = f"P2 prefill {experts}" + (f" beside {kind.upper()}" if kind else "")
        bench.hold(share_bar(name, found["ours"], found["ceiling"], KERNEL_PERCENT))
        if "own" in found:
            share = 100 * found["ours"] / found["own"]
            report.show(f"  {name}: {share:.1f} % of what its own products would allow (no bar)")
    return found


def turn(bench: Bench, experts: str, model: Path | None) -> dict[str, float | None]:
    bounds = {name: bench.bound(TOKENS, name) for name in dict.fromkeys((experts, "int8"))}
    for name, bound in bounds.items():
        report.show(
            f"  ceiling {TOKENS / bound.seconds:.0f} tok/s: experts in {name} at"
            f" {bound.experts_rate / 1e9:.0f} G/s with {bound.rows_per_expert:.0f} rows each, dense"
            f" at {bound.dense_rate / 1e9:.0f} G/s"
        )
    ours = bench.ours(experts=experts, dense=DENSE[experts], prefill=TOKENS, repeats=2)
    row: dict[str, float | None] = {
        "ceiling": TOKENS / bounds["int8"].seconds,
        "ours": ours["prefill"]["tok_s"],
    }
    if experts != "int8":
        row["own"] = TOKENS / bounds[experts].seconds
    if model is not None:
        row["peer"] = bench.llama.bench(model, prefill=TOKENS).prefill
    return row


def against_stock(bench: Bench, results: dict[str, Any]) -> None:
    """bf16, the better of its implementations, where this processor multiplies bf16."""
    stock = {}
    for name in STOCK_IMPLEMENTATIONS:
        try:
            turn = bench.stock(experts=name, prefill=TOKENS, repeats=1)
        except TurnFailed as error:
            bench.without(f"P2 against stock {name}", error)
            continue
        stock[name] = turn["prefill_tok_s"]
        report.show(f"  stock bf16 {name}: {stock[name]:.1f} tok/s")
    if not stock:
        return
    results["stock"], best = stock, max(stock.values())
    for experts in DENSE:
        rows = [row for name, row in results.items() if name.startswith(experts) and "ours" in row]
        if not rows:
            continue
        bar = ratio_bar(
            f"P2 prefill {experts} against stock bf16 ({best:.1f} tok/s)",
            rows[-1]["ours"],
            best,
            STOCK_BAR,
        )
        if report.has_flag(STOCK_FLAG):
            bench.hold(bar)
        else:
            report.show(f"  {bar.line()} (no bar: this processor has no {STOCK_FLAG})")
