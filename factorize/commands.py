"""What the command line's `factorize` and `evaluate` do, as functions: paths in, words out."""

import shlex
import time
from pathlib import Path

import torch

from moestro.engine import ProgressFn
from moestro.factorize.facts import FactorizeError, Plan, SplitOptions, disk_errors
from moestro.factorize.methods import load_tokenizer, make_plan, read_windows
from moestro.factorize.sources import DenseModel

from .apply import apply_plan
from .demo import prepare_dense
from .evaluate import load_model, score

DEMO = "demo"


def run_factorize(
    source: str,
    out: Path,
    *,
    calibration: list[Path],
    plan: Path | None,
    write_plan: Path | None,
    experts: int,
    shared: int,
    top_k: int,
    calibration_tokens: int,
    seed: int,
    progress: ProgressFn,
    cache_dir: Path | None = None,
) -> str:
    """Writes the model with experts of `source` ("demo" or a folder) to `out`; returns a summary.

    `plan` is applied as it is; without one, `calibration` texts make one first, which `write_plan`
    keeps. The demo's dense model is kept in `cache_dir` (where `out` is, if none is given). Raises
    FactorizeError.
    """
    if out.exists():
        raise FactorizeError(f"{out} exists already; name a new folder")
    started_s = time.monotonic()
    folder = prepare_dense(cache_dir or out.parent, progress) if source == DEMO else Path(source)
    if plan is not None:
        recipe = Plan.read(plan)
    else:
        options = SplitOptions(
            experts=experts,
            shared_neurons=shared,
            top_k=top_k,
            calibration_tokens=calibration_tokens,
            seed=seed,
        )
        command = factorize_command(source, calibration, write_plan, options)
        recipe = make_plan(folder, options, calibration, progress, command=command)
    made_s = time.monotonic() - started_s
    with disk_errors(out.parent):
        if write_plan is not None:
            write_plan.parent.mkdir(parents=True, exist_ok=True)
            recipe.write(write_plan)
        apply_plan(recipe, folder, out, progress)
    return _summary(recipe, folder, out, made_s, time.monotonic() - started_s - made_s)


def factorize_command(
    source: str, calibration: list[Path], write_plan: Path | None, options: SplitOptions
) -> str:
    """The command line that makes the same plan again."""
    # sums round otherwise with another number of threads
    words = [f"OMP_NUM_THREADS={torch.get_num_threads()}", "moestro", "factorize", source, "OUT"]
    for text in calibration:
        words += ["--calibration", str(text)]
    words += ["--experts", str(options.experts), "--shared", str(options.shared_neurons)]
    words += ["--top-k", str(options.top_k), "--seed", str(options.seed)]
    words += ["--calibration-tokens", str(options.calibration_tokens)]
    if write_plan is not None:
        words += ["--write-plan", str(write_plan)]
    return shlex.join(words)


def _summary(plan: Plan, folder: Path, out: Path, plan_s: float, apply_s: float) -> str:
    dense = DenseModel.open(folder)
    options = plan.facts.options
    width = options.expert_neurons(dense.neurons)
    share = (options.shared_neurons + options.top_k * width) / dense.neurons
    size_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return "\n".join(
        (
            f"{out}: {dense.layers} layers, each {options.shared_neurons} neurons always on and "
            f"{options.experts} experts of {width}, {options.top_k} per token "
            f"({share:.1%} of the FFN), {size_bytes / 1e6:.0f} MB",
            f"plan {plan.sha256[:16]}, ready after {plan_s:.1f} s, applied in {apply_s:.1f} s: "
            f"{plan.facts.method}",
            f"the routers find {plan.facts.router_hit:.1%} of the {options.top_k} experts that "
            "matter most to a calibration token",
        )
    )


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
    tokenizer = load_tokenizer(folder)
    lines = []
    for text in texts:
        found = score(model, read_windows(tokenizer, [text], tokens), text, progress)
        lines.append(f"{text}: perplexity {found.value:.3f} over {found.tokens} tokens")
    return "\n".join(lines)
