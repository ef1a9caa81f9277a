"""P7: eight sequences at once against one, demo model, int8 experts and dense."""

from typing import Any

import report

from moestro.factorize import prepare_demo

from .bars import Bar, Link, bound_s, ratio_bar, share_bar
from .bench import Bench, TurnFailed, begin, finish
from .disk import read_bytes_per_s, readers_of

BATCH, STEPS = 8, 32
SPEED_UP, BOUND_PERCENT = 4.0, 85.0
FORMAT = "int8"


def run(bench: Bench) -> None:
    begin(f"P7 batch {BATCH} against batch 1, demo model, {FORMAT}")
    try:
        results = measure(bench)
    except TurnFailed as error:
        bench.without("P7", error)
        results = {}
    finish("p7", bench, results)


def measure(bench: Bench) -> dict[str, Any]:
    demo = prepare_demo(bench.demo_cache, lambda _: None)
    common: dict[str, Any] = {
        "model": demo,
        "experts": FORMAT,
        "dense": FORMAT,
        "decode": STEPS,
        "prefetch": False,
    }
    one = bench.ours(**common, host_memory=None)
    eight = bench.ours(**common, host_memory=None, batch=BATCH)
    bytes_all = one["slots"] * one["slot_bytes"]
    few = {"host_memory": bytes_all // 2, "batch": BATCH}
    demanded = bench.ours(**common, **few)
    half = bench.ours(**common | {"prefetch": True}, **few)
    rates = {name: turn["decode"]["tok_s"] for name, turn in (("one", one), ("eight", eight))}
    report.show(f"  all resident: {rates} tok/s (ceiling: {BATCH} x)")
    bench.hold(ratio_bar(f"P7 batch {BATCH} all resident", rates["eight"], rates["one"], SPEED_UP))
    step = demanded["decode"]["per_step"]
    each = step["loads"] / step["misses"]
    bench.hold(Bar("P7 loads per distinct missing expert", each, 1.0, "x", at_most=True))
    hold_half(bench, half, eight["decode"]["median_step_s"])
    turns = {"one": one, "eight": eight, "half, on demand": demanded, "half": half}
    return {name: turn["decode"] for name, turn in turns.items()}


def hold_half(bench: Bench, half: dict[str, Any], resident_s: float) -> None:
    """`half` against what a step takes with all resident, or the disk for what it lacks."""
    pack = max(bench.cache(FORMAT).rglob("*"), key=lambda path: path.stat().st_size)
    slot_bytes, step = half["slot_bytes"], half["decode"]["per_step"]
    disk = Link(read_bytes_per_s(pack, slot_bytes, readers_of(slot_bytes)))
    least_s = bound_s(resident_s, step["loaded_bytes"], disk)
    taken_s = half["decode"]["median_step_s"]
    missed = step["misses"] + step["prefetch_hits"]
    report.show(
        f"  half resident: {missed:.0f} of {missed + step['hits']:.0f} distinct experts missing per"
        f" step, {step['prefetch_hits']:.0f} of them read ahead, disk"
        f" {disk.bytes_per_s / 1e6:.0f} MB/s, step {1000 * taken_s:.1f} ms, all resident"
        f" {1000 * resident_s:.1f} ms, bound {1000 * least_s:.1f} ms"
    )
    bench.hold(share_bar("P7 half resident", 1 / taken_s, 1 / least_s, BOUND_PERCENT))
