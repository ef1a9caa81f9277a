"""P5: the fixed cost of the MoE block, router to combine, where widths are tiny."""

from typing import Any

import report

from .bars import Bar, medians
from .bench import Bench, TurnFailed, begin, finish
from .geometry import NARROW
from .maker import make_random
from .processes import last_json, module

SIDES = ("ours-native", "ours-int8", "stock")
BLOCK_SHARE, LAYER_SHARE = 0.25, 0.25
LABELS = {"block": "MoE block", "layer": "whole layer"}


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
                outcome = module("full.overhead", model, bench.cache("narrow"), side)
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
        for part, wanted in (("block", BLOCK_SHARE), ("layer", LAYER_SHARE)):
            name = f"P5 {LABELS[part]} {side}"
            if part in found and part in stock:
                share = found[part] / stock[part]
                what = f"{name} ({1000 * found[part]:.3f} ms) against stock eager"
                bench.hold(Bar(what, share, wanted, "x", at_most=True))
            else:
                bench.without(name, "no clock around it ever ran: it is no module's forward")
        if "layer" not in found and "step" in found and "step" in stock:
            share = found["step"] / stock["step"]
            what = f"P5 whole step {side}, for its layers, against stock eager"
            bench.hold(Bar(what, share, LAYER_SHARE, "x", at_most=True))
