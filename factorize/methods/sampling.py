"""Calibration text that the dense model writes itself, where the user has none.

After LLM-QAT (arXiv 2305.17888): a window starts with a token drawn from the whole vocabulary, goes
on with the likeliest few, which lead to a place where the model has something to say, and then with
tokens drawn as the model foretells them. Letters: N windows, S tokens of one.
"""

from typing import Any

import torch

from moestro.engine import Progress, ProgressFn

LIKELIEST_TOKENS = 3
SAMPLED_AT_ONCE = 32


@torch.inference_mode()
def sample_windows(
    model: Any, vocabulary: int, tokens: int, window: int, seed: int, progress: ProgressFn
) -> torch.Tensor:
    """[N, window] ids, `tokens` together, rounded down to whole windows (one at least)."""
    draw = torch.Generator().manual_seed(seed)
    count = max(1, tokens // window)
    made: list[torch.Tensor] = []
    for start in range(0, count, SAMPLED_AT_ONCE):
        rows = min(SAMPLED_AT_ONCE, count - start)
        made.append(_written(model, vocabulary, rows, window, draw, progress))
    return torch.cat(made)


def _written(
    model: Any, vocabulary: int, rows: int, window: int, draw: torch.Generator, progress: ProgressFn
) -> torch.Tensor:
    ids = torch.randint(vocabulary, (rows, 1), generator=draw)
    cache = None
    for length in range(1, window):
        progress(Progress("sample a text", length, window - 1, f"tokens of {rows} windows"))
        out = model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1, :vocabulary].float()
        if length <= LIKELIEST_TOKENS:
            following = logits.argmax(dim=1, keepdim=True)
        else:
            following = torch.multinomial(logits.softmax(dim=1), 1, generator=draw)
        ids = torch.cat([ids, following], dim=1)
    return ids
