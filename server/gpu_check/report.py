"""A run of checks as one JSON object and as one page of text.

The object: moestro (version), device (of each figure), imagined, quick, status (running, passed,
failed, interrupted), checks (by name: status, took_s, why, facts, problems, warnings, traceback).
"""

import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from moestro.engine import Checked, Outcome, Status

from .scrub import scrubbed

SHOWN_WARNINGS = 3  # of a check, on the page


INTERRUPTED = "interrupted"


def status(outcomes: Sequence[Outcome]) -> str:
    found = {outcome.status for outcome in outcomes}
    if Status.INTERRUPTED in found:
        return INTERRUPTED
    if found & {Status.WAITING, Status.RUNNING}:
        return "running"
    return "failed" if Status.FAILED in found else "passed"


def as_object(checked: Checked, state: str) -> dict[str, Any]:
    """The object that the head of this file describes; `state` is its status."""
    return {
        "moestro": version("moestro"),
        "device": checked.device_name,
        "imagined": checked.imagined,
        "quick": checked.quick,
        "status": state,
        "checks": {outcome.name: _check_object(outcome) for outcome in checked.outcomes},
    }


def _check_object(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status.value,
        "took_s": round(outcome.took_s, 3),
        "why": scrubbed(outcome.why),
        "facts": _plain(outcome.found.facts),
        "problems": [scrubbed(problem) for problem in outcome.found.problems],
        "warnings": [scrubbed(warning) for warning in outcome.warnings],
        "traceback": scrubbed(outcome.traceback).splitlines(),
    }


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity, which a broken device may give, as words."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def page(checked: Checked, state: str) -> str:
    """For people, and to be pasted into a report of a fault."""
    count = {one: sum(o.status is one for o in checked.outcomes) for one in Status}
    shown = ", ".join(f"{number} {one.value}" for one, number in count.items() if number)
    lines = [
        f"moestro {version('moestro')} gpu-check{' --quick' if checked.quick else ''},"
        f" {checked.device_name}: {state} ({shown})"
    ]
    for outcome in checked.outcomes:
        lines += _check_lines(outcome, checked.device_name)
    return "\n".join(lines) + "\n"


def _check_lines(outcome: Outcome, device_name: str) -> list[str]:
    if outcome.status is Status.NOT_RUN:
        return [f"{outcome.name}: not run: {scrubbed(outcome.why)}"]
    if outcome.status is Status.WAITING:
        return [f"{outcome.name}: not run yet"]
    lines = [
        f"{outcome.name}: {outcome.status.value} after {outcome.took_s:.1f} s, measured on"
        f" {device_name}"
    ]
    lines += [f"  {line}" for line in outcome.found.lines]
    lines += [f"  PROBLEM: {scrubbed(problem)}" for problem in outcome.found.problems]
    lines += [f"  warned: {scrubbed(said)}" for said in outcome.warnings[:SHOWN_WARNINGS]]
    if outcome.traceback:
        lines.append(f"  {scrubbed(outcome.traceback.splitlines()[-1])}")
    return lines
