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


def test_all_bits_of_a_seed_count() -> None:
    flat = torch.zeros(50_000)
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), 2**64 - 2]
    firsts = [Sampler(SamplingParams(seed=seed)).choose(flat) for seed in seeds]
    assert len(set(firsts)) == len(seeds)


def test_each_answer_to_one_prompt_has_its_own_stream() -> None:
    params = SamplingParams(seed=7, n=2)
    first, second = (Sampler(params, index=index) for index in range(2))
    flat = torch.zeros(1000)
    assert [first.choose(flat) for _ in range(5)] != [second.choose(flat) for _ in range(5)]


def test_log_probabilities_are_the_models_own() -> None:
    from moestro.engine.step.logprobs import of_rows, of_token

    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(1))
    wanted = logits.log_softmax(-1)
    found = [of_token(row.numpy(), 3, 4) for row in logits]
    assert [one.logprob for one in found] == pytest.approx(wanted[:, 3].tolist(), abs=1e-5)
    for one, row in zip(found, wanted, strict=True):
        values, ids = row.topk(4)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [score for _, score in one.top] == pytest.approx(values.tolist(), abs=1e-5)
    together = of_rows(logits, [3] * 5, 4)
    assert [one.top[0][0] for one in together] == [one.top[0][0] for one in found]
    assert [one.logprob for one in together] == pytest.approx(wanted[:, 3].tolist(), abs=1e-5)
    best = of_token(logits[0].numpy(), int(logits[0].argmax()), 1)
    assert best.logprob == best.top[0][1], "the very same number, for who compares them"
