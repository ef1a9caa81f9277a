"""P6: memory seen from outside: first start (packing) and second, a long prompt, decode."""

from typing import Any

import report

from .bars import Bar
from .bench import Bench, TurnFailed, begin, finish

PROMPT_TOKENS, DECODE_TOKENS = 4096, 16
SHARE = 1.05
FORMATS = (("int8", "int8"), ("native", "native"))
EXPERTS_SHARE = 0.2  # of all experts in slots
KV_BYTES = 5 << 28  # 1.25 GiB: 4,096 tokens and what is decoded after them


def run(bench: Bench) -> None:
    begin(f"P6 peak RSS from outside, prompt of {PROMPT_TOKENS} tokens, a fifth of the experts")
    results: dict[str, Any] = {}
    for experts, dense in FORMATS:
        bench.only()
        place = bench.shop.path("cache-p6")
        for start in ("first", "second"):
            try:
                found, outcome = bench.ours_seen(
                    experts=experts,
                    dense=dense,
                    cache=place,
                    host_memory=int(EXPERTS_SHARE * bench.all_experts(experts)),
                    kv_memory=KV_BYTES,
                    prefill=PROMPT_TOKENS,
                    decode=DECODE_TOKENS,
                    repeats=1,
                    warm=False,
                )
            except TurnFailed as error:
                bench.without(f"P6 {experts} {start} start", error)
                break
            name = f"P6 {experts}/{dense} {start} start"
            peak, planned = outcome.peak_rss_bytes, found["planned_bytes"]
            results[name] = {"peak_bytes": peak, "planned_bytes": planned}
            report.show(f"  {name}: peak {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB")
            bench.hold(Bar(name, peak / planned, SHARE, "x planned", at_most=True))
        bench.shop.drop(place)
    finish("p6", bench, results)
