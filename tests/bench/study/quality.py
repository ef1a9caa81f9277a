"""Perplexity, divergence from the dense model and hit rate of one row, on held-out windows.

Letters: N windows of S tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moestro.cache import NextUse, Phase, TraceEvent, replay

from .cells import Values
from .simulate import Experts, Sections, Simulation

KL_EVERY = 4  # of the scored positions; the softmax over all words is what a divergence costs
KEPT_SHARE = 0.5  # of the experts' bytes, for the hit rate


def measure_quality(
    simulation: Simulation,
    windows: torch.Tensor,
    dense_hidden: torch.Tensor,
    *,
    after_prompt: bool,
) -> Values:
    """`windows` [texts, N, S]; `dense_hidden` [texts * N, S, H] of the dense model.

    `losses` are means over each window's scored tokens, `second_half` over those of its second
    half. The divergence KL(dense || row) is over what counts for the row: with `after_prompt` the
    second half alone, as the first one chose its neurons.
    """
    texts, count, tokens = windows.shape
    sections, half = Sections.halves(tokens), tokens // 2
    losses, second, divergence, compared = [], [], 0.0, 0
    for ids, reference in zip(windows.flatten(0, 1), dense_hidden, strict=True):
        hidden = simulation.hidden(ids, sections)
        logits = simulation.logits(hidden[:-1])
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        losses.append(float(loss.mean()))
        second.append(float(loss[half:].mean()))
        places = torch.arange(half if after_prompt else 0, tokens - 1, KL_EVERY)
        divergence += kl_sum(simulation.logits(reference[places]), logits[places])
        compared += len(places)
    return {
        "losses": _rounded(losses, texts, count),
        "second_half": _rounded(second, texts, count),
        "kl": round(divergence / compared, 6),
    }


def kl_sum(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum over positions of KL(softmax(reference) || softmax(logits)), both [P, V], in nats."""
    wanted, found = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum())


def _rounded(flat: Sequence[float], texts: int, count: int) -> list[list[float]]:
    return [[round(flat[t * count + n], 6) for n in range(count)] for t in range(texts)]


def hit_rate(simulation: Simulation, experts: Experts, windows: torch.Tensor) -> float:
    """Of decoding token by token with half of the experts in memory, under the default policy.

    The tokens of `windows` [N, S], one after the other, are the text that is decoded.
    """
    assert experts.chosen is not None
    experts.chosen.clear()
    for ids in windows:
        simulation.hidden(ids, Sections.halves(len(ids)))
    layers = len(experts.plan.order)
    count = experts.plan.facts.options.experts
    slots = int(KEPT_SHARE * layers * count)
    events = decode_events(experts.chosen, layers)
    return replay(events, [count] * layers, slots, NextUse()).hit_rate(Phase.DECODE)


def decode_events(chosen: Sequence[torch.Tensor], layers: int) -> Iterator[TraceEvent]:
    """From each call's experts [S, k], layer after layer and window after window."""
    step = 0
    for start in range(0, len(chosen), layers):
        window = [each.tolist() for each in chosen[start : start + layers]]
        for token in range(len(window[0])):
            for layer, experts in enumerate(window):
                asked = tuple(sorted(experts[token]))
                yield TraceEvent(step, Phase.DECODE, layer, asked)
            step += 1


def bytes_per_token(config: Any, neurons: float, experts: int) -> int:
    """Of weights in bfloat16 that one token reads: `neurons` of each FFN, a router of `experts`

    rows, attention, norms and the output matrix (the input's one row counts for nothing).
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    attention = 2 * hidden * queries + 2 * hidden * keys
    layer = attention + 2 * hidden + 3 * hidden * neurons + hidden * experts
    return int(2 * (layers * layer + hidden + hidden * config.vocab_size))
