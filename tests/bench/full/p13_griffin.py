"""P13: what GRIFFIN gains at half of the FFN, on the demo's dense model, native, one thread.

Its FFN is split into experts without a router and none shared, so that a prompt runs all of it and
keeps half for its answer. The ceiling: what a step takes with all of it, less half of the FFN's
bytes at the speed at which this memory can be read; all else is the fixed cost.
"""

from pathlib import Path
from typing import Any

import report
from transformers import AutoTokenizer

from moestro.factorize import (
    Inputs,
    Outputs,
    SplitOptions,
    prepare_dense,
    run_factorize,
)

from .bars import Bar, ratio_bar
from .bench import Bench, TurnFailed, begin, finish
from .p10_demo import PROMPT

EXPERTS, DENSITY, DECODE = 32, 0.5, 48
CEILING_PERCENT = 90.0
FLOOR = 1.25  # the paper's gain, on GPUs and models fifty times as large


def run(bench: Bench) -> None:
    begin(f"P13 GRIFFIN: half of the FFN for an answer, {EXPERTS} experts, native")
    results: dict[str, Any] = {}
    folder = bench.shop.path("griffin")
    try:
        make(bench, folder)
        results = measured(bench, folder)
    except TurnFailed as error:
        bench.without("P13", error)
    bench.shop.drop(folder)
    finish("p13", bench, results)


def make(bench: Bench, folder: Path) -> None:
    """Contiguous experts: which neurons are together changes no speed."""
    options = SplitOptions(
        experts=EXPERTS,
        shared_neurons=0,
        top_k=EXPERTS // 2,
        calibration_tokens=512,
        split="contiguous",
        router="none",
    )
    text = bench.shop.path("griffin.txt")
    text.write_text(PROMPT * 40)
    dense = prepare_dense(bench.demo_cache, lambda _: None)
    inputs = Inputs(calibration=(text,), cache_dir=bench.demo_cache)
    run_factorize(str(dense), folder, options, inputs, Outputs(), lambda _: None)


def measured(bench: Bench, folder: Path) -> dict[str, Any]:
    prompt: list[int] = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    bench.only()
    turns: dict[str, list[float]] = {"whole": [], "half": []}
    rates, ffn_bytes = [], 0
    for _ in range(max(3, bench.turns)):
        for name, density in (("whole", None), ("half", DENSITY)):
            found = bench.ours(
                model=folder,
                experts="native",
                dense="native",
                host_memory=None,
                prompt=prompt,
                decode=DECODE,
                expert_density=density,
            )
            turns[name].append(found["decode"]["median_step_s"])
            ffn_bytes = found["experts"] * found["slot_bytes"]
        rates.append(bench.streams().best)
    whole_s, half_s = (sorted(turns[name])[len(turns[name]) // 2] for name in ("whole", "half"))
    rate = max(rates)
    fixed_s = whole_s - ffn_bytes / rate
    least_s = fixed_s + DENSITY * ffn_bytes / rate
    report.show(
        f"  whole {1000 * whole_s:.1f} ms, half {1000 * half_s:.1f} ms;"
        f" FFN {ffn_bytes / 1e6:.0f} MB at {rate / 1e9:.1f} GB/s;"
        f" all but it {1000 * fixed_s:.1f} ms; ceiling {1000 * least_s:.1f} ms"
    )
    bench.hold(ratio_bar("P13 half of the FFN against all of it", 1 / half_s, 1 / whole_s, FLOOR))
    share = 100 * least_s / half_s
    bench.hold(Bar("P13 half of the FFN", share, CEILING_PERCENT, "% of the ceiling"))
    return {"whole_s": whole_s, "half_s": half_s, "least_s": least_s, "bytes_per_s": rate}
