import torch

from moestro.factorize.methods.routing import expert_norms, fit_router, hit_rate, ridge


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ridge_finds_a_linear_law() -> None:
    inputs, law = normal(400, 8), normal(3, 8, seed=1)
    assert torch.allclose(ridge(inputs, inputs @ law.T, 1e-6), law, atol=1e-4)


def test_a_stronger_ridge_is_smaller() -> None:
    inputs, targets = normal(50, 8), normal(50, 3, seed=1)
    assert ridge(inputs, targets, 10.0).norm() < ridge(inputs, targets, 0.1).norm()


def test_norms_are_those_of_the_outputs() -> None:
    neurons, down, groups = normal(5, 6), normal(4, 6, seed=1), torch.tensor([[0, 3], [1, 5]])
    norms = expert_norms(neurons, down, groups)
    output = down[:, [1, 5]] @ neurons[2, [1, 5]]
    assert norms.shape == (5, 2)
    assert torch.allclose(norms[2, 1], output.norm())


def test_the_router_finds_what_a_line_can_tell() -> None:
    inputs = normal(500, 8)
    norms = (inputs @ normal(6, 8, seed=1).T + 10).square()
    router = fit_router(torch.cat([inputs, torch.ones(500, 1)], dim=1), norms, 1e-6)
    assert router.dtype == torch.float16
    assert hit_rate(torch.cat([inputs, torch.ones(500, 1)], dim=1), norms, router, 2) > 0.95


def test_half_by_chance() -> None:
    hit = hit_rate(normal(2000, 8), normal(2000, 6, seed=1).abs(), normal(6, 8, seed=2), 3)
    assert 0.4 < hit < 0.6
