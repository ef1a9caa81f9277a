"""P2: a prompt of 512 tokens through the 7 B geometry, int8, all in RAM, one thread."""

from typing import Any

import report

from .bars import medians, ratio_bar, share_bar
from .bench import Bench, TurnFailed, begin, finish

TOKENS = 512
LLAMA_BARS = {"q4_0": 3.5, "q8_0": 7.0}
STOCK_BAR = 7.0
KERNEL_PERCENT = 75.0
STOCK_IMPLEMENTATIONS = ("grouped_mm", "eager")


def run(bench: Bench) -> None:
    begin(f"P2 prefill of {TOKENS} tokens, int8, all in RAM")
    bound = bench.bound(TOKENS)
    ceiling = TOKENS / bound.seconds
    report.show(
        f"  ceiling {ceiling:.0f} tok/s: experts at {bound.experts_rate / 1e9:.0f} G/s with"
        f" {bound.rows_per_expert:.0f} rows each, dense at {bound.dense_rate / 1e9:.0f} G/s"
    )
    turns: list[dict[str, float | None]] = []
    for _ in range(bench.turns):
        row: dict[str, float | None] = {}
        try:
            turn = bench.ours(prefill=TOKENS, repeats=2)
            row["ours"] = turn["prefill"]["tok_s"]
            if bench.llama.available:
                for kind in LLAMA_BARS:
                    model = bench.gguf(kind)
                    row[kind] = bench.llama.bench(model, prefill=TOKENS).prefill
        except TurnFailed as error:
            bench.without("P2", error)
            break
        turns.append(row)
        report.show(f"  turn: {row}")
    found = medians(turns)
    results: dict[str, Any] = {"ceiling_tok_s": ceiling, **found}
    if "ours" in found:
        judge(bench, found, ceiling, results)
    finish("p2", bench, results)


def judge(bench: Bench, found: dict[str, float], ceiling: float, results: dict[str, Any]) -> None:
    bench.hold(share_bar("P2 prefill int8", found["ours"], ceiling, KERNEL_PERCENT))
    for kind, wanted in LLAMA_BARS.items():
        if kind in found:
            what = f"P2 prefill int8 against llama.cpp {kind.upper()} ({found[kind]:.1f} tok/s)"
            bench.hold(ratio_bar(what, found["ours"], found[kind], wanted))
        else:
            bench.without(f"P2 against llama.cpp {kind}", "it is not installed (bench_peers.sh)")
    stock = {}
    for name in STOCK_IMPLEMENTATIONS:
        try:
            turn = bench.stock(experts=name, prefill=TOKENS, repeats=1)
        except TurnFailed as error:
            bench.without(f"P2 against stock {name}", error)
            continue
        stock[name] = turn["prefill_tok_s"]
        report.show(f"  stock bf16 {name}: {stock[name]:.1f} tok/s")
    results["stock"] = stock
    if stock:
        best = max(stock.values())
        what = f"P2 prefill int8 against stock bf16 ({best:.1f} tok/s)"
        bench.hold(ratio_bar(what, found["ours"], best, STOCK_BAR))
