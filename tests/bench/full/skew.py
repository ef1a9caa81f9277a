"""Dense weights that route as real models do: unevenly, and alike from one token to the next.

Every token belongs to a topic. Its embedding carries a constant, its topic, and noise, each in
columns of its own, large enough to survive all layers. Each router reads from the constant which
experts are popular (Zipf), from the topic which it prefers, and from the noise the rest. The head
prefers tokens of the topic of the token it has just seen, so that sampled text dwells on one.

With these strengths an LRU cache of half of the experts hits 83 % in decode, one of a quarter 52 %
(evenly routed: 50 and 25); tests/bench/LOG.md has the policies.
"""

import math
from dataclasses import dataclass

import torch

from .geometry import Geometry

CONSTANT_COLUMN = 0
TOPIC_COLUMNS = 1  # the first of them


@dataclass(frozen=True, slots=True)
class Skew:
    """Router scores are sums of three parts; each number is a standard deviation or an exponent."""

    topics: int = 32
    popularity: float = 0.5  # exponent of Zipf's law over the experts of a layer
    topic_taste: float = 0.8
    token_taste: float = 1.0
    staying: float = 0.95  # share of next tokens that keep the topic
    mark: float = 24.0  # size of the constant and of the topic in an embedding whose noise is 1


def embedding(shape: Geometry, skew: Skew, draw: torch.Generator) -> torch.Tensor:
    """[V, H] fp32; the topic of token t is t mod topics."""
    rows = torch.randn(shape.vocab, shape.hidden, generator=draw)
    rows[:, : TOPIC_COLUMNS + skew.topics] = 0
    rows[:, CONSTANT_COLUMN] = skew.mark
    tokens = torch.arange(shape.vocab)
    rows[tokens, TOPIC_COLUMNS + tokens % skew.topics] = skew.mark
    return rows


def router(shape: Geometry, skew: Skew, draw: torch.Generator) -> torch.Tensor:
    """[E, H] fp32 of one layer, for inputs that RMSNorm has brought to unit size."""
    gain = _norm(shape, skew) / skew.mark
    noise_columns = shape.hidden - TOPIC_COLUMNS - skew.topics
    rows = torch.randn(shape.experts, shape.hidden, generator=draw)
    rows *= skew.token_taste * _norm(shape, skew) / math.sqrt(noise_columns)
    ranks = torch.randperm(shape.experts, generator=draw) + 1
    rows[:, CONSTANT_COLUMN] = -skew.popularity * ranks.float().log() * gain
    tastes = torch.randn(shape.experts, skew.topics, generator=draw)
    rows[:, TOPIC_COLUMNS : TOPIC_COLUMNS + skew.topics] = skew.topic_taste * tastes * gain
    return rows


def head(shape: Geometry, skew: Skew, draw: torch.Generator) -> torch.Tensor:
    """[V, H] fp32: a bonus for the topic at hand that makes it stay with the wanted chance."""
    rows = torch.randn(shape.vocab, shape.hidden, generator=draw) / math.sqrt(shape.hidden)
    odds = skew.staying / (1 - skew.staying) * (skew.topics - 1)
    bonus = math.log(odds) * _norm(shape, skew) / skew.mark
    rows[:, : TOPIC_COLUMNS + skew.topics] = 0
    tokens = torch.arange(shape.vocab)
    rows[tokens, TOPIC_COLUMNS + tokens % skew.topics] = bonus
    return rows


def _norm(shape: Geometry, skew: Skew) -> float:
    """Root mean square of an embedding: what RMSNorm divides by."""
    noise = shape.hidden - TOPIC_COLUMNS - skew.topics
    return math.sqrt((2 * skew.mark**2 + noise) / shape.hidden)
