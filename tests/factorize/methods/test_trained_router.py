"""What all trained routers promise, and what each of them aims at."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moestro.factorize.facts import ROUTERS, SplitOptions
from moestro.factorize.methods.routing import Activity, hit_rate
from moestro.factorize.methods.trained_router import (
    LESSONS,
    mass_targets,
    nearest_experts,
    norm_targets,
    prior_targets,
    reverse_kl,
    train_router,
)

TRAINED = tuple(name for name in ROUTERS if name not in ("ridge", "none"))
every_router = pytest.mark.parametrize("router", TRAINED)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activity(tokens: int = 600, hidden: int = 12, experts: int = 6) -> Activity:
    """An input's sign along one direction for each expert says how much that does."""
    inputs = torch.cat([normal(tokens, hidden - 1), torch.ones(tokens, 1)], dim=1)
    norms = (inputs[:, :experts] + 1).clamp_min(0.05)
    return Activity(inputs, norms, norms.square(), norms, inputs)


def options(router: str, **changes: Any) -> SplitOptions:
    return replace(SplitOptions(router=router, experts=6, top_k=2, router_steps=200), **changes)


def test_all_names_but_the_ridge_are_in_the_table() -> None:
    assert tuple(LESSONS) == TRAINED


@every_router
def test_it_finds_what_a_line_can_tell(router: str) -> None:
    given = activity()
    found = train_router(given, options(router), 1.0)
    assert not list(found.beyond_stock())
    assert (found.last.dtype, tuple(found.last.shape)) == (torch.float16, (6, 12))
    assert hit_rate(found.logits(given.inputs), given.norms, 2) > 0.9  # by chance: 1/3
    assert 0.5 < float((found.logits(given.inputs)).std()) < 2


@every_router
def test_equal_inputs_give_equal_weights(router: str) -> None:
    short = options(router, router_steps=10, router_hidden=4, router_bias=1)
    first, again = (train_router(activity(), short, 1.0) for _ in range(2))
    for name, part in first.tensors().items():
        assert torch.equal(part, again.tensors()[name])


@every_router
def test_the_form_of_the_paper_has_a_first_layer_and_a_bias(router: str) -> None:
    given = activity()
    rich = train_router(given, options(router, router_hidden=16, router_bias=1), 1.0)
    shapes = {name: tuple(part.shape) for name, part in rich.tensors().items()}
    assert shapes == {"last": (6, 16), "first": (16, 12), "bias": (6,)}
    assert rich.activation == {"moefication": "tanh"}.get(router, "relu")
    assert hit_rate(rich.logits(given.inputs), given.norms, 2) > 0.85


def test_with_tau_a_linear_router_foretells_norms_not_their_order_alone() -> None:
    given = activity()
    found = train_router(given, options("norm", tau=0.5), 1.0)
    assert not list(found.beyond_stock())
    error = found.logits(given.inputs) - norm_targets(given, 2, 1.0)
    assert float(error.square().mean()) < 0.2 * float(norm_targets(given, 2, 1.0).var())


def test_prior_wants_the_experts_nearest_to_the_output() -> None:
    """Against the definition, with all outputs at hand."""
    outputs = normal(50, 6, 12)  # [T, E, H]
    y = outputs.sum(dim=1)
    given = replace(
        activity(),
        norms=outputs.norm(dim=2),
        alignment=(outputs * y[:, None]).sum(dim=2),
    )
    for scale in (1.0, 3.0):
        errors = (outputs - y[:, None] / scale).square().mean(dim=2)
        wanted = torch.zeros(50, 6).scatter(1, errors.topk(2, largest=False).indices, 1.0)
        assert torch.equal(
            torch.zeros(50, 6).scatter(1, nearest_experts(given, 2, scale), 1.0), wanted
        )
        targets = prior_targets(given, 2, scale)
        assert torch.allclose(targets, wanted.softmax(dim=1))
    # FactorLLM's figures for 4 experts, 2 chosen
    four = replace(given, norms=given.norms[:, :4], alignment=given.alignment[:, :4])
    assert prior_targets(four, 2, 2.0)[0].sort().values.tolist() == pytest.approx(
        [0.134, 0.134, 0.366, 0.366], abs=1e-3
    )


def test_the_loss_is_nothing_at_the_targets() -> None:
    targets = normal(5, 6).softmax(dim=1)
    assert float(reverse_kl(targets.log(), targets)) == pytest.approx(0, abs=1e-6)
    assert float(reverse_kl(torch.zeros(5, 6), targets)) > 0.1


def test_targets_keep_the_order_of_what_they_measure() -> None:
    given = activity()
    for targets in (norm_targets(given, 2, 1.0), mass_targets(given, 2, 1.0)):
        assert torch.equal(targets.argsort(dim=1), given.norms.argsort(dim=1))
    shares = mass_targets(given, 2, 1.0)
    assert float(shares.min()) >= 0
    assert float(shares.max()) == 1
