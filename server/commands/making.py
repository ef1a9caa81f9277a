"""`moestro factorize`, `export` and `evaluate`: words in, the toolbox's answer on stdout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moestro.engine import StartError
from moestro.server.facts import Refused

from .start import watched_progress

SAME, MEASURED = "same", "measured"  # in place of a number of experts for each layer


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except StartError as error:
        raise Refused(str(error)) from error


def factorize(
    source: str,
    out: Path,
    *,
    shared: int,
    seed: int,
    router_bias: bool,
    dry_run: bool,
    cache_dir: Path,
    calibration: Sequence[Path] = (),
    plan: Path | None = None,
    write_plan: Path | None = None,
    work: Path | None = None,
    recover: str | None = None,
    recover_minutes: float = 60.0,
    recover_steps: int | None = None,
    recover_tokens: int = 65_536,
    recover_rank: int | None = None,
    recover_bits: int = 8,
    recover_mode: str = "token",
    layer_top_k: str = SAME,
    deltas: Path | None = None,
    write_deltas: Path | None = None,
    **choices: Any,
) -> None:
    """`choices` are the fields of SplitOptions that have the flag's own name. Raises Refused."""
    from moestro import factorize as toolbox

    recovery = None
    if recover is not None:
        bounds = (recover_minutes, recover_steps, recover_tokens, recover_rank)
        stages, modes = toolbox.recovery_stages(recover), toolbox.recovery_modes(recover_mode)
        recovery = toolbox.RecoverOptions(stages, *bounds, seed, modes, recover_bits)
    named = layer_top_k in (SAME, MEASURED)
    layers = "" if named else " ".join(layer_top_k.replace(",", " ").split())
    options = toolbox.SplitOptions(
        shared_neurons=shared,
        seed=seed,
        router_bias=int(router_bias),
        layer_top_k=layers,
        **choices,
    )
    measured = layer_top_k == MEASURED
    inputs = toolbox.Inputs(tuple(calibration), plan, deltas, work, cache_dir, measured)
    outputs = toolbox.Outputs(write_plan, write_deltas)
    with _refusals():
        if dry_run:
            report = toolbox.run_dry(source, out, options, inputs, recovery)
        else:
            with watched_progress() as progress:
                report = toolbox.run_factorize(
                    source, out, options, inputs, outputs, progress, recovery
                )
    typer.echo(report)


def print_plan(path: Path) -> None:
    """Raises Refused."""
    from moestro.factorize import show_plan

    with _refusals():
        text = show_plan(path)
    typer.echo(text)


def evaluate(
    folder: Path, texts: list[Path], tokens: int, experts_per_token: int | None, mode: str
) -> None:
    """Raises Refused."""
    from moestro.factorize import run_evaluate

    with _refusals(), watched_progress() as progress:
        report = run_evaluate(folder, texts, tokens, experts_per_token, progress, mode)
    typer.echo(report)


def export(folder: Path, out: Path, plan: Path | None) -> None:
    """Raises Refused."""
    from moestro.factorize import run_export

    with _refusals(), watched_progress() as progress:
        report = run_export(folder, out, plan, progress)
    typer.echo(report)
