"""A self-check before serving: packed, chunked and alone must give the same logits.

A model whose layers keep state that the packed cache does not know (recurrent, convolutional)
would answer wrongly without any error. Running one short sequence alone, and again in two chunks
beside another sequence, shows that in a second.
"""

import torch
from transformers import PreTrainedModel

from moestro.engine.facts import ModelRefused
from moestro.engine.model import (
    KVStore,
    PackedCache,
    SequenceKV,
    Thinner,
    experts_aside,
    run_packed,
)

# Of the largest logit. Float rounding stays a hundred times below the first; with int8 or in bf16,
# rounding can turn a digit or a router's choice, while a state that leaks gives differences near 1.
TOLERANCE = 1e-3
COARSE_TOLERANCE = 0.1
LENGTH_TOKENS = 6
SPLIT_TOKENS = 4


def check_packed(
    model: PreTrainedModel, cache: PackedCache, vocab_size: int, *, coarse: bool = False
) -> float:
    """The largest relative difference found. Raises ModelRefused where it is not rounding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, LENGTH_TOKENS), generator=generator).tolist()
    first, other = ids[0], ids[1][:3]
    with torch.inference_mode():
        alone = _run(model, cache, [(SequenceKV.alone(LENGTH_TOKENS), first)])
        chunked, beside = SequenceKV.alone(LENGTH_TOKENS), SequenceKV.alone(LENGTH_TOKENS)
        _run(model, cache, [(beside, other), (chunked, first[:SPLIT_TOKENS])])
        packed = _run(model, cache, [(chunked, first[SPLIT_TOKENS:]), (beside, other[:1])])
    if not bool(torch.isfinite(alone).all()):
        raise ModelRefused("the weights give logits that are not finite: damaged or NaN tensors")
    worst = float((alone[0] - packed[0]).abs().max() / alone[0].abs().max().clamp(min=1e-6))
    if not worst <= (COARSE_TOLERANCE if coarse else TOLERANCE):  # NaN too
        raise ModelRefused(
            f"models of type {model.config.model_type!r} are not carried yet: a sequence in company"
            f" gives other logits than alone (relative difference {worst:.1e})"
        )
    return worst


def compare_thin(model: PreTrainedModel, cache: PackedCache, vocab_size: int) -> None:
    """Let modules of `model` that agree with the stock ones be computed in one call each."""
    thinner, store = Thinner(model, cache), KVStore(2)
    ids = torch.randint(vocab_size, (2, 4), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [SequenceKV(store, [page]) for page in range(2)]
    with torch.inference_mode(), experts_aside(model):
        _run(model, cache, [(kv, own[:3]) for kv, own in zip(sequences, ids, strict=True)])
        with thinner.compare():
            _run(model, cache, [(kv, own[3:]) for kv, own in zip(sequences, ids, strict=True)])


def _run(
    model: PreTrainedModel, cache: PackedCache, parts: list[tuple[SequenceKV, list[int]]]
) -> torch.Tensor:
    cache.begin([(kv, len(tokens)) for kv, tokens in parts])
    starts = [kv.length_tokens for kv, _ in parts]
    done = False
    try:
        logits = run_packed(model, cache, [tokens for _, tokens in parts], starts)
        done = True
    finally:
        cache.end(commit=done)
    return logits
