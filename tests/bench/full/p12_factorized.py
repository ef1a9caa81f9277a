"""P12: what offloading gains from factorizing, on the demo behind an emulated link.

A device has room for 60 % of the FFN's bytes. With all experts on the model is the dense one: it
streams 40 % of them at every token, as many as with whole layers pinned, since the cache keeps what
is asked for soonest. With 12 of 24 it has its shared half and a fifth of its routed experts there,
and streams what it misses. Every figure here is emulated. Also printed: what the dense model could
do at the best, were its streaming to overlap perfectly with its compute.
"""

from typing import Any

import report

from moestro.factorize import prepare_demo
from moestro.factorize.evaluate import tokenizer_of

from .bars import Bar, Link
from .bench import Bench, TurnFailed, begin, finish
from .p10_demo import PROMPT

ROOM = 0.6  # of the FFN's bytes
RATIOS = {1.0: None, 2.0: 1.5}  # the dense model's streaming over its compute: the bar
FORMAT, DECODE = "int8", 32
DENSITY = 0.5  # of the experts that a prompt keeps: as many as the router gives a token


def run(bench: Bench) -> None:
    begin(f"P12 factorized against all experts on, {ROOM:.0%} of the FFN resident, {FORMAT}")
    results: dict[str, Any] = {}
    try:
        results = compared(bench)
    except TurnFailed as error:
        bench.without("P12", error)
    finish("p12", bench, results)


def compared(bench: Bench) -> dict[str, Any]:
    demo = prepare_demo(bench.demo_cache, lambda _: None)
    prompt: list[int] = tokenizer_of(demo)(PROMPT)["input_ids"]
    bench.only()

    def turn(**fields: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"experts": FORMAT, "dense": FORMAT, "decode": DECODE}
        settings |= {"prompt": prompt, "temperature": 1.0, "host_memory": None}
        return bench.ours(model=demo, **settings, **fields)

    few = turn()
    each = few["experts"] // 30  # experts of a layer
    whole = turn(settings={"experts_per_token": each})
    routed_bytes = few["experts"] * few["slot_bytes"]
    ffn_bytes = 2 * routed_bytes  # the shared half has as many neurons
    device = int((ROOM - 0.5) * ffn_bytes)
    whole_s, few_s = (found["decode"]["median_step_s"] for found in (whole, few))
    report.show(
        f"  all resident: all experts {1000 * whole_s:.1f} ms, 12 of 24 {1000 * few_s:.1f} ms"
    )
    rows: dict[str, Any] = {"whole_s": whole_s, "few_s": few_s, "ffn_bytes": ffn_bytes}
    for ratio, wanted in RATIOS.items():
        link = Link((1 - ROOM) * ffn_bytes / (ratio * whole_s))
        behind: dict[str, Any] = {"link_bytes_per_s": link.bytes_per_s, "device_memory": device}
        found = {
            "all experts": turn(settings={"experts_per_token": each}, **behind),
            "router": turn(**behind),
            f"prompt, density {DENSITY:g}": turn(expert_density=DENSITY, **behind),
        }
        least_s = max(1.0, ratio) * whole_s
        dense_s = found["all experts"]["decode"]["median_step_s"]
        row = {
            name: {
                "step_s": one["decode"]["median_step_s"],
                "bytes": one["decode"]["per_step"]["misses"] * few["slot_bytes"],
                "speedup": dense_s / one["decode"]["median_step_s"],
            }
            for name, one in found.items()
        }
        report.show(f"  streaming {ratio:g} x compute, emulated {link.bytes_per_s / 1e9:.3g} GB/s")
        report.show(f"    all experts, at the best: {1000 * least_s:.1f} ms")
        for name, values in row.items():
            report.show(
                f"    {name}: {1000 * values['step_s']:.1f} ms,"
                f" {values['bytes'] / ffn_bytes:.1%} of the FFN's bytes a token,"
                f" {values['speedup']:.2f} x all experts"
            )
        if wanted is not None:
            what = f"P12 12 of 24 against all experts on, streaming {ratio:g} x (emulated)"
            bench.hold(Bar(what, row["router"]["speedup"], wanted))
        rows[f"{ratio:g} x"] = row
    return rows
