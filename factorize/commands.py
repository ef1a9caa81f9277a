"""What the command line's `factorize` and `evaluate` do, as functions: paths in, words out."""

import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.engine import ProgressFn
from moestro.factorize.facts import Deltas, FactorizeError, Plan, SplitOptions, disk_errors
from moestro.factorize.methods import make_plan, read_windows
from moestro.factorize.recovery import MODES, RANK, TRIES, RecoverOptions
from moestro.factorize.sources import DenseModel

from .apply import apply_plan, output_factors, storage_dtype
from .demo import find_dense, prepare_dense
from .evaluate import load_model, score, tokenizer_of
from .forecast import (
    DenseShape,
    Stage,
    apply_stage,
    distill_stage,
    forecast,
    layers_stage,
    repair_stage,
)
from .recovering import LAYERS_TOKENS, check_texts, run_measured_layers, run_recovery
from .report import forecast_table, plan_screen, router_lines, seconds_of, summary
from .sequence_scores import prompts_can_choose, prompts_choose

DEMO = ("demo", "demo-dense")  # as a source, both are the dense model that the demo is made of


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a factorization may find on the disk."""

    calibration: tuple[Path, ...] = ()  # texts; without any, the model writes one
    plan: Path | None = None  # applied, or recovered, as it is
    deltas: Path | None = None  # of a recovery, to be applied with `plan` or to go on from
    work: Path | None = None  # what the model did is kept here, and found again
    cache_dir: Path | None = None  # has the demo's dense model; None: where the result is written
    measures_layers: bool = False  # how many experts each layer takes; the plan's own: False


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a factorization keeps beside the model that it writes."""

    plan: Path | None = None
    deltas: Path | None = None


def run_factorize(
    source: str,
    out: Path,
    options: SplitOptions,
    inputs: Inputs,
    outputs: Outputs,
    progress: ProgressFn,
    recovery: RecoverOptions | None = None,
) -> str:
    """Writes the model with experts of `source` (a name of DEMO or a folder) to `out`.

    Returns a summary. Without a plan in `inputs` one is made by `options`. `recovery` trains what
    the plan has lost before it is applied. Raises FactorizeError.
    """
    _check_new(out)
    _check_recovery(inputs, recovery, options)
    started_s = time.monotonic()
    cache_dir = inputs.cache_dir or out.parent
    folder = prepare_dense(cache_dir, progress) if source in DEMO else Path(source)
    _check_recoverable(folder, recovery, inputs)
    command = factorize_command(source, inputs, outputs, options, recovery)
    plan, deltas = _planned(folder, options, inputs, progress, recovery, command)
    made_s = time.monotonic() - started_s
    with disk_errors(out.parent):
        for kept, path in ((plan, outputs.plan), (deltas, outputs.deltas)):
            if kept is not None and path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                kept.write(path)
        apply_plan(plan, folder, out, progress, deltas)
    applied_s = time.monotonic() - started_s - made_s
    told = summary(plan, DenseModel.open(folder), out, deltas)
    return f"{told}\n{seconds_of(made_s, applied_s)}"


def _planned(
    folder: Path,
    options: SplitOptions,
    inputs: Inputs,
    progress: ProgressFn,
    recovery: RecoverOptions | None,
    command: str,
) -> tuple[Plan, Deltas | None]:
    """What is applied: given, or made of the dense model in `folder`. Raises FactorizeError."""
    given = None if inputs.plan is None else Plan.read(inputs.plan)
    if recovery is not None:
        window_tokens = (options if given is None else given.facts.options).window_tokens
        check_texts(folder, inputs.calibration, recovery, window_tokens)
    plan = given or make_plan(
        folder, options, inputs.calibration, progress, command=command, work=inputs.work
    )
    deltas = None if inputs.deltas is None else Deltas.read(inputs.deltas)
    by_prompt = recovery is not None and recovery.by_prompt
    plan, deltas = _with_layers(folder, plan, deltas, options, inputs, progress, by_prompt)
    if recovery is None:
        return plan, deltas
    return run_recovery(
        folder, plan, inputs.calibration, recovery, progress, command, inputs.work, deltas
    )


def _check_recovery(inputs: Inputs, recovery: RecoverOptions | None, options: SplitOptions) -> None:
    """Raises FactorizeError for what does not go together."""
    if inputs.deltas is not None and inputs.plan is None:
        raise FactorizeError("--deltas go with the --plan that the same recovery wrote; give both")
    if inputs.measures_layers:
        _check_measured(inputs, options)
    if recovery is None:
        return
    recovery.check()
    if inputs.plan is None and options.router == "none":
        raise FactorizeError(
            "recovery practises what routers choose, and --router none has none; leave one out"
        )
    if inputs.plan is None and router_lines(options):
        raise FactorizeError(
            "recovery practises what linear routers choose; leave out --router-hidden, "
            "--router-bias and --tau, or --recover"
        )
    if not inputs.calibration:
        raise FactorizeError("recovery learns from text that people wrote; give --calibration")


def _with_layers(
    folder: Path,
    plan: Plan,
    deltas: Deltas | None,
    options: SplitOptions,
    inputs: Inputs,
    progress: ProgressFn,
    by_prompt: bool,
) -> tuple[Plan, Deltas | None]:
    """Both with the numbers of experts that each layer was measured or given to take.

    Raises FactorizeError.
    """
    if inputs.measures_layers:
        texts = inputs.calibration
        found = run_measured_layers(folder, plan, texts, progress, deltas, by_prompt=by_prompt)
    elif inputs.plan is not None and options.layer_top_k:
        found = plan.with_layers(options.layer_top_k, "as given")
    else:
        return plan, deltas
    if deltas is not None and deltas.facts.plan_sha256 == plan.sha256:
        deltas = deltas.of_plan(found.sha256)
    return found, deltas


def _check_measured(inputs: Inputs, options: SplitOptions) -> None:
    """Raises FactorizeError for what layers cannot be measured with."""
    if not inputs.calibration:
        raise FactorizeError(
            "--layer-top-k measured looks at text that people wrote; give --calibration"
        )
    if inputs.plan is None and options.scale != "one":
        raise FactorizeError(
            "--layer-top-k measured compares sums of one scale; leave out --scale, or give each "
            "layer's number"
        )
    if inputs.plan is None and (options.router == "none" or router_lines(options)):
        raise FactorizeError(
            "--layer-top-k measured needs linear routers; leave out --router none, "
            "--router-hidden, --router-bias and --tau, or give each layer's number"
        )


def _check_recoverable(folder: Path, recovery: RecoverOptions | None, inputs: Inputs) -> None:
    """Raises FactorizeError where the twin's FFN is another form of what recovery would train."""
    if recovery is None and not inputs.measures_layers:
        return
    dense = DenseModel.open(folder)
    if not dense.ffn_as_stored:
        raise FactorizeError(
            f"{dense.family.title} models are not recovered: their feed-forward weights are stored "
            "in another form than the experts'; leave out --recover and --layer-top-k measured"
        )


def run_dry(
    source: str,
    out: Path,
    options: SplitOptions,
    inputs: Inputs,
    recovery: RecoverOptions | None = None,
) -> str:
    """What `run_factorize` would read, write, compute and hold; writes nothing.

    Raises FactorizeError for what that would refuse before any work.
    """
    _check_new(out)
    _check_recovery(inputs, recovery, options)
    dense = DenseModel.open(_found(source, inputs.cache_dir or out.parent))
    _check_recoverable(dense.folder, recovery, inputs)
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
        stored = storage_dtype(dense.carried_dtype, output_factors(recipe)).itemsize
        if recovery is not None:
            recipe.check_recoverable()
        stages = [
            *_layers_stages(shape, options, inputs),
            *_recovery_stages(shape, options, recovery),
            apply_stage(shape, stored),
        ]
        table = forecast_table(source, out, stages, None, None, recovery)
        return "\n".join([table, *router_lines(recipe.facts.options)])
    options.expert_neurons(dense.neurons)
    options.check_layers(dense.layers)
    stages = forecast(
        shape,
        options,
        text_bytes=_text_bytes(inputs.calibration),
        keeps_work=inputs.work is not None,
        stored_weight_bytes=_stored(dense, options).itemsize,
    )
    stages[-1:-1] = [
        *_layers_stages(shape, options, inputs),
        *_recovery_stages(shape, options, recovery),
    ]
    table = forecast_table(source, out, stages, options, inputs.work, recovery)
    return "\n".join([table, *router_lines(options)])


def _layers_stages(shape: DenseShape, options: SplitOptions, inputs: Inputs) -> list[Stage]:
    if not inputs.measures_layers:
        return []
    return [layers_stage(shape, LAYERS_TOKENS, TRIES, options.window_tokens)]


def _recovery_stages(
    shape: DenseShape, options: SplitOptions, recovery: RecoverOptions | None
) -> list[Stage]:
    found = []
    if recovery is not None and "repair" in recovery.stages:
        found.append(repair_stage(shape, recovery.tokens))
    if recovery is not None and "lora" in recovery.stages:
        found.append(distill_stage(shape, recovery.steps or 0, options.window_tokens))
    return found


def show_plan(path: Path) -> str:
    """One screen of text about the plan in `path`. Raises FactorizeError."""
    return plan_screen(path, Plan.read(path))


def factorize_command(
    source: str,
    inputs: Inputs,
    outputs: Outputs,
    options: SplitOptions,
    recovery: RecoverOptions | None = None,
) -> str:
    """The command line that makes the same plan and deltas again."""
    # sums round otherwise with another number of threads
    words = [f"OMP_NUM_THREADS={torch.get_num_threads()}", "moestro", "factorize", source, "OUT"]
    for text in inputs.calibration:
        words += ["--calibration", str(text)]
    if inputs.plan is not None:
        words += ["--plan", str(inputs.plan)]
    if inputs.deltas is not None:
        words += ["--deltas", str(inputs.deltas)]
    words += ["--experts", str(options.experts), "--shared", str(options.shared_neurons)]
    words += ["--top-k", str(options.top_k), "--seed", str(options.seed)]
    words += ["--calibration-tokens", str(options.calibration_tokens)]
    words += ["--split", options.split, "--router", options.router, "--scale", options.scale]
    if options.router != "ridge":
        words += ["--router-steps", str(options.router_steps)]
    if options.router_hidden:
        words += ["--router-hidden", str(options.router_hidden)]
    words += ["--router-bias"] if options.router_bias else []
    if inputs.measures_layers:
        words += ["--layer-top-k", "measured"]
    elif options.layer_top_k:
        words += ["--layer-top-k", options.layer_top_k.replace(" ", ",")]
    if options.tau < 1:
        words += ["--tau", f"{options.tau:g}"]
    if recovery is not None:
        words += ["--recover", ",".join(recovery.stages)]
        rank = recovery.rank or (RANK if inputs.deltas is None else None)  # else that of the deltas
        words += ["--recover-rank", str(rank)] if rank is not None else []
        words += ["--recover-bits", str(recovery.bits)] if recovery.bits != 8 else []
        words += ["--recover-tokens", str(recovery.tokens)]
        if recovery.modes != ("token",):
            words += ["--recover-mode", ",".join(recovery.modes)]
        if recovery.steps is not None:
            words += ["--recover-steps", str(recovery.steps)]
        else:
            words += ["--recover-minutes", f"{recovery.minutes:g}"]
    for flag, path in (("--write-plan", outputs.plan), ("--write-deltas", outputs.deltas)):
        if path is not None:
            words += [flag, str(path)]
    return shlex.join(words)


def run_evaluate(
    folder: Path,
    texts: list[Path],
    tokens: int,
    experts_per_token: int | None,
    progress: ProgressFn,
    mode: str = MODES[0],
) -> str:
    """Perplexity of the model in `folder` on the first `tokens` tokens of each text; one line each.

    In the mode sequence of the second halves of windows whose first halves choose the experts; a
    dense model has none to choose, and is compared with on the same places. Raises FactorizeError.
    """
    if not texts:
        raise FactorizeError("no text given; name one or more text files")
    if mode not in MODES:
        raise FactorizeError(f"experts are chosen in the modes {' and '.join(MODES)}, not {mode}")
    by_prompt = mode == MODES[1]
    chooses = by_prompt and prompts_can_choose(folder)
    model, tokenizer = load_model(folder, experts_per_token), tokenizer_of(folder)
    lines = []
    with prompts_choose(model) if chooses else nullcontext():
        for text in texts:
            windows = read_windows(tokenizer, [text], tokens)
            first = windows.shape[1] // 2 if by_prompt else 0
            found = score(model, windows, text, progress, first)
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
    counts = {
        "one": tuple(map(float, options.layer_counts(1))),
        "inverse-k": (float(options.experts),),
    }
    return storage_dtype(dense.carried_dtype, counts.get(options.scale, (options.top_k + 0.5,)))
