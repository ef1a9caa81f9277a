"""What is observed of a dense model, and the texts that it is observed on.

Letters: T tokens, H hidden size, I neurons of one FFN.
"""

from collections.abc import Iterator, Sequence
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
    """What one FFN saw and did, and two of its matrices; fp32."""

    inputs: torch.Tensor  # [T, H], window after window
    neurons: torch.Tensor  # [T, I] = silu(gate) * up
    down: torch.Tensor  # [H, I]
    gate: torch.Tensor  # [I, H]
    window_tokens: int


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


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """`config`: the model's, where transformers does not read the one in `folder`."""
    return AutoTokenizer.from_pretrained(
        folder, config=config, local_files_only=True, trust_remote_code=False
    )


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
