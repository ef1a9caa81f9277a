"""P4: a device of few slots behind an emulated link. Every figure here is emulated."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import report

from moestro.engine import EngineConfig
from moestro.factorize import prepare_demo

from .bars import Link, bound_s, share_bar
from .bench import Bench, TurnFailed, begin, finish

SHARES = (0.25, 0.5)  # of the experts that the device holds
RATIOS = (0.5, 1.0, 2.0)  # link time over the time of the same step with all resident
REAL_LINKS = (12e9, 25e9)  # bytes per second, reported
DECODE, PREFILL = 24, 256
PERCENT = {"decode": 90.0, "prefill": 85.0}
WIDE = 1e12  # bytes per second: a link that costs nothing, to count what is missing
FORMAT = "int8"


def run(bench: Bench) -> None:
    begin("P4 emulated link, int8")
    results: dict[str, Any] = {}
    if "link" not in {each.name for each in fields(EngineConfig)}:
        bench.without("P4", "this build has no emulated link (EngineConfig.link)")
    else:
        for name in ("demo", "skewed"):
            bench.only()
            try:
                results[name] = one_model(bench, name)
            except TurnFailed as error:
                bench.without(f"P4 {name}", error)
    finish("p4", bench, results)


def one_model(bench: Bench, name: str) -> dict[str, Any]:
    if name == "demo":
        model = prepare_demo(bench.demo_cache, lambda _: None)
    else:
        model = bench.checkpoint("skewed")
    resident = turn(bench, model)
    total = resident["experts"] * resident["slot_bytes"]
    free_s = times(resident)
    found: dict[str, Any] = {"resident_s": free_s}
    for share in SHARES:
        device = int(share * total)
        probe = turn(bench, model, link_bytes_per_s=WIDE, device_memory=device)
        missing = missing_bytes(probe)
        for part in PERCENT:
            for ratio in RATIOS:
                link = Link(missing[part] / (ratio * free_s[part]))
                label = f"P4 {name} {part}, {share:.0%} resident, link {ratio:g} x compute"
                row = against(bench, model, device, link, part, free_s, label, hold=True)
                found[label] = row
        for speed in REAL_LINKS:
            label = f"P4 {name} decode, {share:.0%} resident, {speed / 1e9:.0f} GB/s"
            row = against(bench, model, device, Link(speed), "decode", free_s, label, hold=False)
            found[label] = row
    return found


def against(
    bench: Bench,
    model: Path,
    device: int,
    link: Link,
    part: str,
    free_s: dict[str, float],
    label: str,
    *,
    hold: bool,
) -> dict[str, float]:
    got = turn(bench, model, link_bytes_per_s=link.bytes_per_s, device_memory=device)
    taken_s = times(got)[part]
    least_s = bound_s(free_s[part], missing_bytes(got)[part], link)
    report.show(
        f"  emulated {link.bytes_per_s / 1e9:.3g} GB/s: {1000 * taken_s:.1f} ms,"
        f" bound {1000 * least_s:.1f} ms"
    )
    if hold:
        bench.hold(share_bar(f"{label} (emulated)", 1 / taken_s, 1 / least_s, PERCENT[part]))
    return {"seconds": taken_s, "bound_s": least_s, "bytes_per_s": link.bytes_per_s}


def turn(bench: Bench, model: Path, **fields: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "experts": FORMAT,
        "dense": FORMAT,
        "decode": DECODE,
        "prefill": PREFILL,
    }
    return bench.ours(model=model, temperature=1.0, host_memory=None, **settings, **fields)


def times(turned: dict[str, Any]) -> dict[str, float]:
    """Seconds of one decode step and of one prompt."""
    prompts = sorted(turned["prefill"]["seconds"])
    return {"decode": turned["decode"]["median_step_s"], "prefill": prompts[len(prompts) // 2]}


def missing_bytes(turned: dict[str, Any]) -> dict[str, float]:
    size = turned["slot_bytes"]
    return {
        "decode": size * turned["decode"]["per_step"]["misses"],
        "prefill": size * turned["prefill"]["per_run"]["misses"],
    }
