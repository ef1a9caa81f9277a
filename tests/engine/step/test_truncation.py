"""What is cut is what transformers cuts; what is drawn is what the mass says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moestro.engine.step.truncation import (
    Floats,
    Truncation,
    draw,
    largest,
    nucleus_floor,
    truncated,
)

SHAPES = {
    "flat": lambda g, size: torch.randn(size, generator=g) * 0.01,
    "noise": lambda g, size: torch.randn(size, generator=g) * 2,
    "peaked": lambda g, size: torch.randn(size, generator=g) * 8,
    "steps": lambda g, size: torch.linspace(0, -90, size)[torch.randperm(size, generator=g)],
}


def stock(logits: torch.Tensor, cut: Truncation) -> torch.Tensor:
    """Which tokens transformers keeps: boolean [V]."""
    warpers = LogitsProcessorList()
    if cut.top_k:
        warpers.append(TopKLogitsWarper(cut.top_k))
    if cut.top_p < 1:
        warpers.append(TopPLogitsWarper(cut.top_p))
    if cut.min_p:
        warpers.append(MinPLogitsWarper(cut.min_p))
    empty = torch.empty((1, 0), dtype=torch.long)
    return torch.isfinite(warpers(empty, logits[None].double()))[0]  # type: ignore[arg-type]


def weights_of(logits: torch.Tensor) -> Floats:
    found: Floats = (logits - logits.max()).exp().numpy()
    return found


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("size", [1, 7, 600, 20_000])
def test_what_is_kept_is_what_transformers_keeps(shape: str, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = SHAPES[shape](generator, size)
    weights = weights_of(logits)
    for top_k in (0, 1, 3, 50, 5000):
        for top_p in (1e-6, 0.1, 0.8, 0.95, 0.9999, 1.0):
            for min_p in (0.0, 0.05, 1.0):
                cut = Truncation(top_k, top_p, min_p)
                wanted = set(stock(logits, cut).nonzero()[:, 0].tolist())
                found = set(truncated(weights, cut).nonzero()[0].tolist())
                # where the mass just reaches top_p, rounding decides about a token of a flat shape
                share = weights[list(wanted ^ found)].sum() / weights.sum()
                assert share <= 1e-4, (cut, len(wanted), len(found))


@given(
    st.lists(st.floats(-50, 0, width=32), min_size=1, max_size=1500),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_where_the_mass_is_reached(logits: list[float], chance: float) -> None:
    weights = np.exp(np.array(logits, np.float32))
    weights[np.argmax(weights)] = 1
    reached = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    found = draw(weights, chance)
    assert weights[found] > 0
    low = reached[found - 1] if found else 0.0
    assert low - 1e-5 <= chance <= reached[found] + 1e-5


def test_a_token_without_a_chance_is_never_drawn() -> None:
    weights = np.zeros(2000, np.float32)
    weights[[3, 700]] = 1.0
    chances = [0.0, 0.49, 0.5, 0.99, 1 - 2**-53]
    assert [draw(weights, chance) for chance in chances] == [3, 3, 700, 700, 700]


def test_draws_follow_the_distribution() -> None:
    weights = weights_of(torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 3)
    chances = np.random.default_rng(5).random(20_000)
    counts = np.bincount([draw(weights, chance) for chance in chances], minlength=3000)
    wanted = weights / weights.sum() * len(chances)
    often = wanted > 50
    spread = (counts[often] - wanted[often]) / np.sqrt(wanted[often])
    assert often.sum() > 20 and np.abs(spread).max() < 5


@pytest.mark.parametrize("size", [5, 1000, 60_000])
def test_the_largest_in_order(size: int) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size)).numpy()
    for count in (0, 1, 4, 20, 999):
        wanted = np.argsort(-numbers, kind="stable")[:count]
        assert largest(numbers, count).tolist() == wanted.tolist()
    assert largest(np.zeros(size, np.float32), 3).tolist() == [0, 1, 2], "ties by id"


def test_equal_weights_are_kept_together() -> None:
    weights = np.ones(5000, np.float32)
    assert nucleus_floor(weights, 10.0) == 1.0
    assert truncated(weights, Truncation(top_p=0.1)).all()
