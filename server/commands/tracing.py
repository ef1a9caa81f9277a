"""`moestro trace record`, `moestro trace replay` and `moestro trace mix`.

The object that `replay --json` prints: steps, experts (of the model), slot_bytes, slots (one number
per budget), rows (policy, hit_rates: 0 to 1, one per budget; the last is Belady's), live (slots and
hit_rate of the run that was recorded, or null).
"""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from moestro.engine import (
    CURVE_SHARES,
    ReplayTable,
    StartError,
    mix_by_trace,
    record_trace,
    replay_trace,
)
from moestro.server.facts import EXPERT_FORMATS, Refused, Settings

from .plot import check_plot, draw
from .start import prepare_of, watched_progress

MIB = 1 << 20


def run_record(settings: Settings, out: Path, prompts: Path, tokens: int) -> None:
    """Raises Refused where the model cannot be run or the prompts cannot be read."""
    try:
        lines = [line for line in prompts.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--prompts {prompts}: {error}") from error
    if not lines:
        raise Refused(f"--prompts {prompts}: no prompt in it")
    try:
        with watched_progress() as progress:
            found = record_trace(
                settings.to_engine_config(), lines, tokens, out, progress, prepare_of(settings)
            )
    except (StartError, OSError) as error:
        raise Refused(str(error)) from error
    typer.echo(f"{out}: {found.prompts} prompts, {found.tokens} tokens, {found.lookups} lookups")


def run_replay(trace: Path, as_json: bool, plot: Path | None) -> None:
    """Raises Refused where `trace` is none, or nothing can be drawn into `plot`."""
    if plot is not None:
        check_plot(plot)
    try:
        table = replay_trace(trace)
        if plot is not None:
            draw(replay_trace(trace, CURVE_SHARES), plot)
    except StartError as error:
        raise Refused(str(error)) from error
    typer.echo(json.dumps(asdict(table)) if as_json else "\n".join(text_of(table)))


def run_mix(trace: Path, out: Path, fine: str, coarse: str, share: float) -> None:
    """Raises Refused where `trace` is none, `out` cannot be written or a format is not known."""
    for flag, name in (("--fine", fine), ("--coarse", coarse)):
        if name not in EXPERT_FORMATS:
            raise Refused(f"{flag} {name}: this build has {', '.join(EXPERT_FORMATS)}")
    if fine == coarse:
        raise Refused(f"--fine and --coarse are both {fine}: nothing would be mixed")
    try:
        found = mix_by_trace(trace, fine, coarse, share)
        found.write(out)
    except StartError as error:
        raise Refused(str(error)) from error
    except OSError as error:
        raise Refused(f"{out}: {error.strerror}") from error
    count = sum(len(experts) for layer in found.layers.values() for experts in layer.values())
    typer.echo(f"{out}: {count} experts in {fine}, all others in {coarse}")


def text_of(table: ReplayTable) -> list[str]:
    """A heading, a line of budgets, a line per policy."""
    widths = [f"{slots * table.slot_bytes / MIB:.1f} MiB" for slots in table.slots]
    live = table.live
    return [
        f"{table.steps} steps, {table.experts} experts; hit rates of decode in percent",
        "slots".ljust(20) + "".join(f"{slots:>12}" for slots in table.slots),
        "--host-memory".ljust(20) + "".join(f"{width:>12}" for width in widths),
        *(
            row.policy.ljust(20) + "".join(f"{100 * rate:12.1f}" for rate in row.hit_rates)
            for row in table.rows
        ),
        *([f"recorded with {live.slots} slots: {100 * live.hit_rate:.1f}"] if live else []),
    ]
