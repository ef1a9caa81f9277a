"""A recovery on files: the dense model's folder and texts in, a better plan and deltas out."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from moestro.engine import ProgressFn
from moestro.factorize.facts import Deltas, Plan
from moestro.factorize.methods import load_dense, load_tokenizer, read_windows
from moestro.factorize.recovery import RecoverOptions, measured_layers, recover
from moestro.factorize.sources import DenseModel

log = logging.getLogger("moestro.factorize")

LAYERS_TOKENS = 4096  # that tell what each layer loses


def run_measured_layers(
    folder: Path,
    plan: Plan,
    texts: Sequence[Path],
    progress: ProgressFn,
    start: Deltas | None = None,
    *,
    by_prompt: bool = False,
) -> Plan:
    """`plan` with the number of experts for each layer that loses least on `texts`.

    `start` has what a recovery has added to it; `by_prompt`: a prompt's tokens choose the experts.
    Raises SourceRefused for a model that `plan` was not made for and for deltas of another plan,
    FactorizeError for routers that are not linear or texts that are too short.
    """
    plan.check_layers_free()
    windows = _windows(folder, plan, texts, LAYERS_TOKENS, start)
    model = load_dense(folder)
    counts = measured_layers(model, plan, windows, progress, start, by_prompt=by_prompt)
    way = " that a prompt chose for" if by_prompt else ""
    log.info("experts per token, layer by layer: %s", ",".join(map(str, counts)))
    return plan.with_layers(
        " ".join(map(str, counts)), f"as measured on {LAYERS_TOKENS} tokens{way}"
    )


def check_texts(
    folder: Path, texts: Sequence[Path], options: RecoverOptions, window_tokens: int
) -> None:
    """Raises FactorizeError for texts that are too short, before minutes are spent on other stages.

    Other stages read fewer tokens.
    """
    read_windows(load_tokenizer(folder), texts, options.tokens, window_tokens)


def run_recovery(
    folder: Path,
    plan: Plan,
    texts: Sequence[Path],
    options: RecoverOptions,
    progress: ProgressFn,
    command: str = "",
    work: Path | None = None,
    start: Deltas | None = None,
) -> tuple[Plan, Deltas]:
    """What `recover` gives, of the dense model in `folder`.

    `work` keeps where the distillation stands; `start` has the deltas of `plan` to go on from.
    Raises SourceRefused for a model that `plan` was not made for and for deltas of another plan,
    FactorizeError for unfit options or texts that are too short.
    """
    windows = _windows(folder, plan, texts, options.tokens, start)
    state = None
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        state = work / "distillation.safetensors"
    return recover(load_dense(folder), plan, windows, options, progress, command, state, start)


def _windows(
    folder: Path, plan: Plan, texts: Sequence[Path], tokens: int, start: Deltas | None
) -> torch.Tensor:
    """[N, S] ids of `texts`, for the model in `folder` that `plan` and `start` were made for."""
    dense = DenseModel.open(folder)
    plan.check_recoverable()
    plan.check_fits(dense.layers, dense.neurons, dense.hidden, dense.content_sha256())
    if start is not None:
        start.check_fits(dense.layers, dense.neurons, dense.hidden, plan.sha256)
    window = plan.facts.options.window_tokens
    return read_windows(load_tokenizer(folder), texts, tokens, window)
