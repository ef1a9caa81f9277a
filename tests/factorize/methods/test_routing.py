import torch

from moestro.factorize.methods.calibration import LayerSample
from moestro.factorize.methods.routing import Activity, fit_ridge, hit_rate, observe, ridge


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ridge_finds_a_linear_law() -> None:
    inputs, law = normal(400, 8), normal(3, 8, seed=1)
    assert torch.allclose(ridge(inputs, inputs @ law.T, 1e-6), law, atol=1e-4)


def test_a_stronger_ridge_is_smaller() -> None:
    inputs, targets = normal(50, 8), normal(50, 3, seed=1)
    assert ridge(inputs, targets, 10.0).norm() < ridge(inputs, targets, 0.1).norm()


def test_what_each_expert_adds_is_observed() -> None:
    neurons, down, groups = normal(5, 6), normal(4, 6, seed=1), torch.tensor([[0, 3], [1, 5]])
    seen = observe(LayerSample(normal(5, 4), neurons, down, normal(6, 4), 5), groups)
    output = down[:, [1, 5]] @ neurons[2, [1, 5]]
    whole = output + down[:, [0, 3]] @ neurons[2, [0, 3]]
    assert seen.norms.shape == (5, 2)
    assert torch.allclose(seen.norms[2, 1], output.norm())
    assert torch.allclose(seen.output[2], whole, atol=1e-6)
    assert torch.allclose(seen.alignment[2, 1], output @ whole, atol=1e-5)
    assert torch.allclose(seen.mass[2, 1], neurons[2, [1, 5]].abs().sum())


def test_the_router_finds_what_a_line_can_tell() -> None:
    inputs = normal(500, 8)
    norms = (inputs @ normal(6, 8, seed=1).T + 10).square()
    inputs = torch.cat([inputs, torch.ones(500, 1)], dim=1)
    router = fit_ridge(Activity(inputs, norms, norms, norms, inputs), 1e-6)
    assert router.last.dtype == torch.float16
    assert hit_rate(router.logits(inputs), norms, 2) > 0.95


def test_half_by_chance() -> None:
    hit = hit_rate(normal(2000, 6, seed=2), normal(2000, 6, seed=1).abs(), 3)
    assert 0.4 < hit < 0.6
