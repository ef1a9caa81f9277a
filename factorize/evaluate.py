"""How well a model predicts a text, by plain transformers: no engine, no cache, no hooks."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moestro.engine import Manifest, Progress, ProgressFn, RouterFacts, load_routers, read_config
from moestro.factorize.facts import FactorizeError
from moestro.factorize.methods import load_tokenizer, quiet_bars, read_windows


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Over `tokens` scored ones: the first of each window, or its first half, is only context."""

    text: Path
    value: float
    tokens: int


def load_model(folder: Path, experts_per_token: int | None = None) -> Any:
    """The stock model in fp32; with another number of experts where moestro's manifest allows it.

    Raises FactorizeError.
    """
    config = _own_config(folder)
    if experts_per_token is not None:
        factor = _checked_factor(Manifest.read(folder), experts_per_token, folder)
        config = read_config(folder)
        config.num_experts_per_tok = experts_per_token
    with quiet_bars(), nullcontext() if config is None else _no_report():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise FactorizeError(f"{folder} is not a model that loads: {error}") from error
    load_routers(model, folder)
    if experts_per_token is not None:
        for layer in model.model.layers:
            layer.block_sparse_moe.experts.down_proj.data *= experts_per_token / factor
    return model.eval()


def tokenizer_of(folder: Path) -> Any:
    """Of a model that `load_model` loads."""
    return load_tokenizer(folder, _own_config(folder))


def _own_config(folder: Path) -> Any:
    """Of a folder whose config.json transformers does not read; None of any other."""
    return None if RouterFacts.of(folder) is None else read_config(folder)


@contextmanager
def _no_report() -> Iterator[None]:
    """transformers tells of routers that it misses, which come from a file of ours."""
    told = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(told)


def _checked_factor(manifest: Manifest | None, experts: int, folder: Path) -> float:
    """What the outputs of experts are stored times. Raises FactorizeError."""
    if manifest is None:
        raise FactorizeError(
            f"{folder} was not made by `moestro factorize`: its number of experts per token is "
            "part of the model"
        )
    if not manifest.has_router:
        raise FactorizeError(f"{folder} has no router: its tokens take all experts")
    if not 1 <= experts <= manifest.num_experts:
        raise FactorizeError(f"between 1 and {manifest.num_experts} experts, not {experts}")
    return manifest.output_factor


@torch.inference_mode()
def perplexity(
    folder: Path,
    text: Path,
    tokens: int,
    progress: ProgressFn,
    experts_per_token: int | None = None,
    window: int = 512,
) -> Perplexity:
    """Of the first `tokens` tokens of `text`, in windows that know nothing of each other.

    Raises FactorizeError when the text is shorter or the model does not load.
    """
    model = load_model(folder, experts_per_token)
    tokenizer = tokenizer_of(folder)
    return score(model, read_windows(tokenizer, [text], tokens, window), text, progress)


@torch.inference_mode()
def score(
    model: Any, windows: torch.Tensor, text: Path, progress: ProgressFn, first: int = 0
) -> Perplexity:
    """`windows` [N, S] ids of `text`; those behind place `first` are scored."""
    loss, scored = 0.0, 0
    for done, window in enumerate(windows):
        progress(Progress(f"evaluate {text.name}", done, len(windows), "windows"))
        logits = model(window[None], use_cache=False).logits[0, first:-1].float()
        wanted = window[first + 1 :]
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        scored += len(wanted)
    progress(Progress(f"evaluate {text.name}", len(windows), len(windows), "windows"))
    return Perplexity(text, math.exp(loss / scored), scored)
