"""Logits to ids."""

import pytest
import torch

from moestro.engine import SamplingParams
from moestro.engine.step.sampler import NonFiniteLogits, Sampler

LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0, 2.0])


def draw(params: SamplingParams, times: int = 200) -> list[int]:
    sampler = Sampler(params)
    return [sampler.choose(LOGITS) for _ in range(times)]


def test_greedy_takes_the_largest() -> None:
    assert set(draw(SamplingParams(temperature=0.0))) == {1}


def test_top_k_and_top_p_bound_the_choice() -> None:
    assert set(draw(SamplingParams(top_k=2, seed=1))) == {1, 2}
    assert set(draw(SamplingParams(top_p=0.3, seed=1))) == {1}
    assert set(draw(SamplingParams(seed=1), 400)) == {0, 1, 2, 3, 4}


def test_a_seed_repeats_and_no_seed_varies() -> None:
    assert draw(SamplingParams(seed=5)) == draw(SamplingParams(seed=5))
    assert draw(SamplingParams(seed=5)) != draw(SamplingParams(seed=6))
    assert draw(SamplingParams()) != draw(SamplingParams())
    assert draw(SamplingParams(seed=-1)) == draw(SamplingParams(seed=-1))


def test_temperature_sharpens() -> None:
    cold, warm = SamplingParams(temperature=0.1, seed=1), SamplingParams(temperature=2.0, seed=1)
    assert len(set(draw(cold))) < len(set(draw(warm)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(NonFiniteLogits):
        Sampler(SamplingParams(temperature=temperature)).choose(logits)


def test_masked_logits_are_fine() -> None:
    logits = LOGITS.clone()
    logits[0] = float("-inf")
    assert Sampler(SamplingParams(seed=3)).choose(logits) != 0
