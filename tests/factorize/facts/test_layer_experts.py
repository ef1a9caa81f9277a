"""The least sum of losses, beside every other choice."""

from itertools import product

import pytest
import torch

from moestro.factorize.facts import least_loss


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_loses_less(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    losses = [
        dict(zip((1, 2, 4, 7), torch.randn(4, generator=draw).tolist(), strict=True))
        for _ in range(4)
    ]
    total = 8 + seed % 9
    found = least_loss(losses, total)
    lost = sum(layer[count] for layer, count in zip(losses, found, strict=True))
    choices = [each for each in product((1, 2, 4, 7), repeat=4) if sum(each) <= total]
    sums = [sum(layer[c] for layer, c in zip(losses, each, strict=True)) for each in choices]
    assert found in choices and lost == min(sums)


def test_of_equal_sums_it_takes_the_fewer_experts() -> None:
    assert least_loss([{4: 0.0, 2: 0.0}, {4: 0.0, 3: 1.0}], 8) == (2, 4)


def test_too_few_for_all_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 experts are too few for 2 layers"):
        least_loss([{2: 0.0}, {2: 0.0}], 3)
