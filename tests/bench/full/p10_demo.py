"""P10: the demo, one stream, against the dense model that it is made of in stock fp32, one thread.

Both go on from the same text. Ours samples, for sampled text is what a cache of experts meets;
stock takes the likeliest token, which costs it least.
"""

from pathlib import Path
from typing import Any

import report

from moestro.factorize import prepare_demo, prepare_dense
from moestro.factorize.evaluate import tokenizer_of

from .bars import medians, ratio_bar
from .bench import Bench, TurnFailed, begin, finish

FORMAT = "int8"
DECODE = 64
PROMPT = (
    "The old lighthouse had been dark for eleven years when the new keeper arrived with two"
    " suitcases, a cat and a letter that nobody in the village wanted to read aloud. On the first"
    " evening she climbed all of the stairs, counted them, and"
)
SHARES = {"all resident": (1.0, 3.0), "half resident": (0.5, 2.0)}  # of the experts; the bar


def run(bench: Bench) -> None:
    begin(f"P10 demo, one stream, {FORMAT}, against the dense model in stock fp32")
    demo = prepare_demo(bench.demo_cache, lambda _: None)
    dense = prepare_dense(bench.demo_cache, lambda _: None)
    prompt: list[int] = tokenizer_of(demo)(PROMPT)["input_ids"]
    turns: list[dict[str, float | None]] = []
    try:
        expert_bytes = ours(bench, demo, prompt, None)["all_bytes"]
        for _ in range(max(3, bench.turns)):
            turns.append(turn(bench, demo, dense, prompt, int(expert_bytes)))
            report.show(f"  turn: {turns[-1]}")
    except TurnFailed as error:
        bench.without("P10", error)
    found = medians(turns)
    for name, (_, wanted) in SHARES.items():
        if name in found:
            what = f"P10 demo decode {name} against stock dense fp32 ({found['stock']:.1f} tok/s)"
            bench.hold(ratio_bar(what, found[name], found["stock"], wanted))
    finish("p10", bench, dict[str, Any](found))


def turn(
    bench: Bench, demo: Path, dense: Path, prompt: list[int], expert_bytes: int
) -> dict[str, float | None]:
    """Tokens per second of stock and of ours at each share of the experts."""
    stock = bench.stock(
        model=dense, dtype="float32", prompt=prompt, decode=DECODE, repeats=bench.turns
    )
    row: dict[str, float | None] = {"stock": stock["decode_tok_s"]}
    for name, (share, _) in SHARES.items():
        budget = None if share == 1.0 else int(share * expert_bytes)
        found = ours(bench, demo, prompt, budget)
        row[name] = found["tok_s"]
        row[f"{name} misses per token"] = found["misses"]
    return row


def ours(bench: Bench, demo: Path, prompt: list[int], host_memory: int | None) -> dict[str, float]:
    found = bench.ours(
        model=demo,
        experts=FORMAT,
        dense=FORMAT,
        host_memory=host_memory,
        prompt=prompt,
        decode=DECODE,
        repeats=bench.turns,
        temperature=1.0,
    )
    decode = found["decode"]
    return {
        "tok_s": decode["tok_s"],
        "misses": decode["per_step"]["misses"],
        "all_bytes": found["slots"] * found["slot_bytes"],
    }
