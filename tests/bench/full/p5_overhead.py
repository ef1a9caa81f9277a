"""P5: the fixed cost of the MoE block, router to combine, where widths are tiny."""

from dataclasses import fields
from typing import Any

import report

from moestro.engine import EngineConfig

from .bars import Bar, medians
from .bench import Bench, TurnFailed, begin, finish
from .geometry import NARROW
from .maker import make_random
from .processes import last_json, module

SIDES = ("ours-native", "ours-int8", "stock")
BLOCK_MS, BLOCK_SHARE, LAYER_SHARE = 0.5, 0.5, 0.4


def run(bench: Bench) -> None:
    shape = NARROW
    begin(
        f"P5 fixed cost of a layer: hidden {shape.hidden}, experts {shape.expert_width} wide,"
        f" top-{shape.experts_per_token} of {shape.experts}, all resident, batch 1"
    )
    model = make_random(bench.shop.path("narrow"), shape)
    turns: dict[str, list[dict[str, float | None]]] = {side: [] for side in SIDES}
    for _ in range(max(3, bench.turns)):
        for side in SIDES:
            try:
                outcome = module("full.overhead", model, bench.cache, side)
                turns[side].append(dict(last_json(outcome.stdout)))
            except TurnFailed as error:
                bench.without(f"P5 {side}", error)
    results: dict[str, Any] = {side: medians(rows) for side, rows in turns.items()}
    for side, found in results.items():
        rest = 1000 * (found.get("layer", 0) - found.get("block", 0))
        parts = ", ".join(f"{name} {1000 * s:.3f} ms" for name, s in found.items())
        report.show(f"  {side}: {parts}, rest of the layer {rest:.3f} ms (ceiling: 0)")
    judge(bench, results)
    finish("p5", bench, results)


def judge(bench: Bench, results: dict[str, Any]) -> None:
    stock = results["stock"]
    for side in SIDES[:-1]:
        found = results[side]
        if "block" not in found or "block" not in stock:
            bench.without(f"P5 {side}", "no clock around the block ever ran")
            continue
        name = f"P5 MoE block {side}"
        bench.hold(Bar(name, 1000 * found["block"], BLOCK_MS, "ms", at_most=True))
        share = found["block"] / stock["block"]
        bench.hold(Bar(f"{name} against stock eager", share, BLOCK_SHARE, "x", at_most=True))
    if "compile" not in {each.name for each in fields(EngineConfig)}:
        bench.without("P5 whole layer compiled", "this build has no --compile")
        share = results["ours-native"].get("layer", 0) / stock["layer"]
        report.show(f"  whole layer, not compiled: {share:.2f} x stock (bar <= {LAYER_SHARE})")
