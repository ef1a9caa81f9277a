"""Log probabilities that a client may see: the model's own, before temperature and all else."""

import numpy as np
import torch

from .events import TokenLogprob
from .truncation import Floats, largest


def of_token(logits: Floats, token_id: int, count: int) -> TokenLogprob:
    """`logits` [V], raw; with the `count` most likely tokens."""
    scores = logits - _log_mass(logits)
    top = tuple((int(one), float(scores[one])) for one in largest(scores, count))
    return TokenLogprob(token_id, float(scores[token_id]), top)


def of_rows(logits: torch.Tensor, token_ids: list[int], count: int) -> list[TokenLogprob]:
    """`logits` [n, V] in fp32, one row for each of the `token_ids`; they become the scores."""
    scores = logits.sub_(logits.logsumexp(-1, keepdim=True))
    said = scores.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(count, logits.shape[1]), dim=-1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprob(token, score, tuple(zip(*top, strict=True)))
        for token, score, top in zip(token_ids, said, tops, strict=True)
    ]


def _log_mass(logits: Floats) -> np.float32:
    """log of the sum of e^logit; torch's exponential is the vectorized one."""
    return np.float32(torch.from_numpy(logits).logsumexp(0))
