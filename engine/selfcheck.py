"""A self-check before serving: in company, in chunks and alone must give the same logits.

A model whose layers keep state that the packed cache does not know (recurrent, convolutional)
would answer wrongly without any error. Running one short sequence alone, and again in two chunks
beside another sequence, shows that in a second. Some classes of transformers cannot go on with a
prompt in a second chunk: their prompts are computed whole.
"""

import logging
from dataclasses import dataclass

import torch

from moestro.engine.facts import ModelRefused
from moestro.engine.lanes import LanePart, PackedLane, PassLane, last_rows
from moestro.engine.model import Thinner, experts_aside

log = logging.getLogger("moestro.engine")

# Of the largest logit. Float rounding stays a hundred times below the first; with int8 or in bf16,
# rounding can turn a digit or a router's choice, while a state that leaks gives differences near 1.
TOLERANCE = 1e-3
COARSE_TOLERANCE = 0.1
# In half precision through dozens of layers, with routers that choose among many: it is said, and
# is no reason yet to refuse a good model.
HALF_TOLERANCE = 0.5
CHUNKS_FACTOR = 10  # a second chunk may differ by so much more than single tokens do
LENGTH_TOKENS = 6
SPLIT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of a model that may serve."""

    worst: float  # the largest relative difference found
    continues: bool  # a prompt may come in several chunks


def check_lane(
    lane: PassLane,
    vocab_size: int,
    compute_dtype: torch.dtype = torch.float32,
    *,
    coarse: bool = False,
) -> Verdict:
    """`lane` has three pages. Raises ModelRefused where what differs is not rounding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, LENGTH_TOKENS), generator=generator).tolist()
    first, other = ids[0], ids[1][:3]
    with torch.inference_mode():
        alone = _step(lane, [LanePart((0, 0), [0], first, 0)])[0]
        if not bool(torch.isfinite(alone).all()):
            raise ModelRefused(_not_finite(compute_dtype))
        chunked = _beside(lane, first, other, [SPLIT_TOKENS, LENGTH_TOKENS - SPLIT_TOKENS])
        single = _beside(lane, first, other, [SPLIT_TOKENS, 1, 1])
    worst, least = _difference(chunked, alone), _difference(single, alone)
    most = COARSE_TOLERANCE if coarse else TOLERANCE
    if compute_dtype.itemsize < torch.float32.itemsize:
        most = HALF_TOLERANCE
        if min(worst, least) > COARSE_TOLERANCE:
            log.warning(
                "self-check: a sequence in company gives other logits than alone (relative"
                " difference %.1e), more than rounding to %s does in most models: answers may"
                " depend on who else is served",
                worst,
                str(compute_dtype).removeprefix("torch."),
            )
    chunks_most = most
    if lane.keeps_states:
        chunks_most = min(most, max(TOLERANCE, CHUNKS_FACTOR * least))
    if worst <= chunks_most:
        return Verdict(worst, continues=True)
    if least <= most and lane.keeps_states:
        return Verdict(least, continues=False)
    kind = lane.model.config.model_type
    raise ModelRefused(
        f"models of type {kind!r} are not carried yet: a sequence in company gives other logits"
        f" than alone (relative difference {worst:.1e})"
    )


def _not_finite(compute_dtype: torch.dtype) -> str:
    if compute_dtype is torch.float16:
        return (
            "the weights give logits that are not finite: fp16 overflow, whose largest number is"
            " 65504 (compute with --device cpu, or on a GPU with bf16), or damaged or NaN tensors"
        )
    return "the weights give logits that are not finite: damaged or NaN tensors"


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-6))


def _beside(lane: PassLane, first: list[int], other: list[int], chunks: list[int]) -> torch.Tensor:
    """The last logits [V] of `first`, computed in `chunks` beside another sequence."""
    start, rows = 0, torch.empty(0)
    for number, tokens in enumerate(chunks):
        beside = LanePart((2, 0), [2], other, 0)
        if number:
            beside = LanePart((2, 0), [2], other[:1], len(other) + number - 1)
        part = LanePart((1, 0), [1], first[start : start + tokens], start)
        rows = _step(lane, [beside, part], forget=start + tokens == len(first))
        start += tokens
    return rows[1]


def compare_thin(lane: PackedLane, vocab_size: int) -> None:
    """Let modules of its model that agree with the stock ones be computed in one call each.

    `lane` has two pages.
    """
    thinner = Thinner(lane.model, lane.cache)
    ids = torch.randint(vocab_size, (2, 4), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode(), experts_aside(lane.model), thinner.compare():
        both = [LanePart((i, 0), [i], own[:3], 0) for i, own in enumerate(ids)]
        _step(lane, both, forget=False)
        _step(lane, [LanePart((i, 0), [i], own[3:], 3) for i, own in enumerate(ids)])


def _step(lane: PassLane, parts: list[LanePart], *, forget: bool = True) -> torch.Tensor:
    """The logits [n, V] of each part's last row."""
    passes = [parts] if lane.packs else [[part] for part in parts]
    try:
        return torch.cat([lane.run(some, last_rows(some)) for some in passes])
    finally:
        for part in parts if forget else ():
            lane.forget(part.key)
