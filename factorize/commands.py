"""What the command line's `factorize` and `evaluate` do, as functions: paths in, words out."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.engine import ProgressFn
from moestro.factorize.facts import FactorizeError, Plan, SplitOptions, disk_errors
from moestro.factorize.methods import make_plan, read_windows
from moestro.factorize.sources import DenseModel

from .apply import apply_plan, output_factors, storage_dtype
from .demo import find_dense, prepare_dense
from .evaluate import load_model, score, tokenizer_of
from .forecast import DenseShape, apply_stage, forecast
from .report import forecast_table, plan_screen, router_lines, seconds_of, summary

DEMO = ("demo", "demo-dense")  # as a source, both are the dense model that the demo is made of


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a factorization may find on the disk."""

    calibration: tuple[Path, ...] = ()  # texts; without any, the model writes one
    plan: Path | None = None  # applied as it is
    work: Path | None = None  # what the model did is kept here, and found again
    cache_dir: Path | None = None  # has the demo's dense model; None: where the result is written


def run_factorize(
    source: str,
    out: Path,
    options: SplitOptions,
    inputs: Inputs,
    write_plan: Path | None,
    progress: ProgressFn,
) -> str:
    """Writes the model with experts of `source` (a name of DEMO or a folder) to `out`.

    Returns a summary. Without a plan in `inputs` one is made by `options`; `write_plan` keeps it.
    Raises FactorizeError.
    """
    _check_new(out)
    started_s = time.monotonic()
    cache_dir = inputs.cache_dir or out.parent
    folder = prepare_dense(cache_dir, progress) if source in DEMO else Path(source)
    if inputs.plan is not None:
        recipe = Plan.read(inputs.plan)
    else:
        command = factorize_command(source, inputs.calibration, write_plan, options)
        recipe = make_plan(
            folder, options, inputs.calibration, progress, command=command, work=inputs.work
        )
    made_s = time.monotonic() - started_s
    with disk_errors(out.parent):
        if write_plan is not None:
            write_plan.parent.mkdir(parents=True, exist_ok=True)
            recipe.write(write_plan)
        apply_plan(recipe, folder, out, progress)
    applied_s = time.monotonic() - started_s - made_s
    return f"{summary(recipe, DenseModel.open(folder), out)}\n{seconds_of(made_s, applied_s)}"


def run_dry(source: str, out: Path, options: SplitOptions, inputs: Inputs) -> str:
    """What `run_factorize` would read, write, compute and hold; writes nothing.

    Raises FactorizeError for what that would refuse before any work.
    """
    _check_new(out)
    dense = DenseModel.open(_found(source, inputs.cache_dir or out.parent))
    shape = DenseShape(
        layers=dense.layers,
        hidden=dense.hidden,
        neurons=dense.neurons,
        vocabulary=int(dense.config.vocab_size),
        attention_weights=dense.attention_weights,
        key_width=dense.key_width,
        source_bytes=dense.source_bytes,
        weight_bytes=dense.dtype.itemsize,
    )
    if inputs.plan is not None:
        recipe = Plan.read(inputs.plan)
        stored = storage_dtype(dense.dtype, output_factors(recipe)).itemsize
        table = forecast_table(source, out, [apply_stage(shape, stored)], None, None)
        return "\n".join([table, *router_lines(recipe.facts.options)])
    options.expert_neurons(dense.neurons)
    stages = forecast(
        shape,
        options,
        text_bytes=_text_bytes(inputs.calibration),
        keeps_work=inputs.work is not None,
        stored_weight_bytes=_stored(dense, options).itemsize,
    )
    table = forecast_table(source, out, stages, options, inputs.work)
    return "\n".join([table, *router_lines(options)])


def show_plan(path: Path) -> str:
    """One screen of text about the plan in `path`. Raises FactorizeError."""
    return plan_screen(path, Plan.read(path))


def factorize_command(
    source: str, calibration: Sequence[Path], write_plan: Path | None, options: SplitOptions
) -> str:
    """The command line that makes the same plan again."""
    # sums round otherwise with another number of threads
    words = [f"OMP_NUM_THREADS={torch.get_num_threads()}", "moestro", "factorize", source, "OUT"]
    for text in calibration:
        words += ["--calibration", str(text)]
    words += ["--experts", str(options.experts), "--shared", str(options.shared_neurons)]
    words += ["--top-k", str(options.top_k), "--seed", str(options.seed)]
    words += ["--calibration-tokens", str(options.calibration_tokens)]
    words += ["--split", options.split, "--router", options.router, "--scale", options.scale]
    if options.router != "ridge":
        words += ["--router-steps", str(options.router_steps)]
    if options.router_hidden:
        words += ["--router-hidden", str(options.router_hidden)]
    words += ["--router-bias"] if options.router_bias else []
    if options.tau < 1:
        words += ["--tau", f"{options.tau:g}"]
    if write_plan is not None:
        words += ["--write-plan", str(write_plan)]
    return shlex.join(words)


def run_evaluate(
    folder: Path,
    texts: list[Path],
    tokens: int,
    experts_per_token: int | None,
    progress: ProgressFn,
) -> str:
    """Perplexity of the model in `folder` on the first `tokens` tokens of each text; one line each.

    Raises FactorizeError.
    """
    if not texts:
        raise FactorizeError("no text given; name one or more text files")
    model = load_model(folder, experts_per_token)
    tokenizer = tokenizer_of(folder)
    lines = []
    for text in texts:
        found = score(model, read_windows(tokenizer, [text], tokens), text, progress)
        lines.append(f"{text}: perplexity {found.value:.3f} over {found.tokens} tokens")
    return "\n".join(lines)


def _check_new(out: Path) -> None:
    if out.exists():
        raise FactorizeError(f"{out} exists already; name a new folder")


def _found(source: str, cache_dir: Path) -> Path:
    if source not in DEMO:
        return Path(source)
    folder = find_dense(cache_dir)
    if folder is None:
        raise FactorizeError(
            f"the dense model of the demo is not in {cache_dir} yet, and a dry run fetches "
            "nothing; run without --dry-run once, which fetches 93 MB"
        )
    return folder


def _text_bytes(texts: Sequence[Path]) -> int:
    """0 without any. Raises FactorizeError when one is not readable."""
    try:
        return sum(path.stat().st_size for path in texts)
    except OSError as error:
        raise FactorizeError(f"cannot read the text {error.filename}: {error.strerror}") from error


def _stored(dense: DenseModel, options: SplitOptions) -> torch.dtype:
    """As far as known before: a calibrated scale is no whole number."""
    known = {"one": float(options.top_k), "inverse-k": float(options.experts)}
    return storage_dtype(dense.dtype, [known.get(options.scale, options.top_k + 0.5)])
