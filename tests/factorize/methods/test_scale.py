import pytest
import torch

from moestro.factorize.methods.calibration import LayerSample
from moestro.factorize.methods.routing import observe
from moestro.factorize.methods.scale import best_scale, fixed_scale

GROUPS = torch.arange(12).view(4, 3)


def sample(seed: int = 0) -> LayerSample:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return LayerSample(normal(30, 6), normal(30, 12), normal(6, 12), normal(12, 6), 30)


def scale_of(given: LayerSample, chosen: torch.Tensor) -> float:
    return best_scale(given, GROUPS, observe(given, GROUPS), chosen)


def test_with_all_experts_it_is_one() -> None:
    every = torch.arange(4).expand(30, 4)
    assert scale_of(sample(), every) == pytest.approx(1, abs=1e-5)


def test_no_other_number_comes_nearer() -> None:
    given = sample()
    chosen = observe(given, GROUPS).norms.topk(2, dim=1).indices
    alpha = scale_of(given, chosen)
    whole = given.neurons @ given.down.T
    mask = torch.zeros(30, 4).scatter(1, chosen, 1.0).repeat_interleave(3, dim=1)
    part = (given.neurons * mask) @ given.down.T
    errors = [float((whole - a * part).norm()) for a in (alpha, alpha * 1.02, alpha * 0.98)]
    assert errors[0] == min(errors)
    assert alpha != pytest.approx(1, abs=1e-3)


def test_equal_parts_want_the_ratio() -> None:
    given = sample()
    neurons, down = given.neurons[:, :3].repeat(1, 4), given.down[:, :3].repeat(1, 4)
    same = LayerSample(given.inputs, neurons, down, given.gate, 30)
    assert scale_of(same, torch.zeros(30, 1, dtype=torch.long)) == pytest.approx(4, rel=1e-5)


def test_what_points_away_is_left_alone() -> None:
    given = sample()
    neurons = torch.ones(30, 12)
    neurons[:, 3:] = -1.0
    away = LayerSample(given.inputs, neurons, torch.ones(6, 12), given.gate, 30)
    assert scale_of(away, torch.zeros(30, 1, dtype=torch.long)) == 1.0


def test_scales_that_are_known_before() -> None:
    assert fixed_scale("one", 8, 2) == fixed_scale("calibrated", 8, 2) == 1.0
    assert fixed_scale("inverse-k", 8, 3) == pytest.approx(8 / 3)
