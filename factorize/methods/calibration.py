"""Runs the dense model over calibration texts, one layer at a time.

Letters: T tokens, H hidden size, I neurons of one FFN. All windows pass one layer before the next
one starts, so that only one layer's neurons are in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from moestro.factorize.facts import FactorizeError


@dataclass(frozen=True, slots=True)
class LayerSample:
    """What one FFN saw and did. `inputs` [T, H], `neurons` [T, I] = silu(gate) * up, fp32."""

    inputs: torch.Tensor
    neurons: torch.Tensor
    down: torch.Tensor  # [H, I]


@contextmanager
def quiet_bars() -> Iterator[None]:
    """transformers draws bars of its own; ours go through `progress`."""
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def load_dense(folder: Path) -> Any:
    with quiet_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_windows(
    tokenizer: Any, texts: Sequence[Path], tokens: int, window: int = 512
) -> torch.Tensor:
    """[N, window] ids: as many windows from the start of each text as make `tokens` together.

    They come in turns (first of each text, second of each …), so that any part is a fair mixture.
    Raises FactorizeError when a text is too short.
    """
    if not texts:
        raise FactorizeError("no text given; name one or more text files")
    each = max(1, tokens // window // len(texts))
    rows = []
    for path in texts:
        try:
            # a few characters make a token; the rest of a long file is not needed
            text = path.read_text("utf-8")[: each * window * 12]
        except (OSError, UnicodeDecodeError) as error:
            raise FactorizeError(f"cannot read the text {path}: {error}") from error
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: each * window]
        if len(ids) < each * window:
            raise FactorizeError(
                f"{path} has {len(ids)} tokens of the {each * window} that are wanted of each "
                "text; use a longer one or ask for fewer tokens"
            )
        rows.append(torch.tensor(ids, dtype=torch.long).view(each, window))
    return torch.stack(rows, dim=1).flatten(0, 1)


@torch.no_grad()
def layer_samples(model: Any, windows: torch.Tensor, batch: int = 4) -> Iterator[LayerSample]:
    """One sample per layer, first layer first. `windows` [N, S]; T = N * S."""
    inner = model.model
    hidden = inner.embed_tokens(windows)
    positions = torch.arange(windows.shape[1])[None]
    angles = inner.rotary_emb(hidden[:1], positions)
    for layer in inner.layers:
        inputs: list[torch.Tensor] = []
        neurons: list[torch.Tensor] = []
        hooks = [
            layer.mlp.register_forward_pre_hook(_keep(inputs)),
            layer.mlp.down_proj.register_forward_pre_hook(_keep(neurons)),
        ]
        # without a mask, sdpa is causal
        hidden = torch.cat(
            [
                layer(part, attention_mask=None, position_ids=positions, position_embeddings=angles)
                for part in hidden.split(batch)
            ]
        )
        for hook in hooks:
            hook.remove()
        yield LayerSample(torch.cat(inputs), torch.cat(neurons), layer.mlp.down_proj.weight)


def _keep(into: list[torch.Tensor]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    return lambda _module, arguments: into.append(arguments[0].flatten(0, -2))
