"""Why the twin must choose by raw logits: even gates and the order of the experts, measured."""

import torch
from transformers import GraniteMoeSharedConfig, Qwen3MoeConfig
from transformers.models.granitemoeshared.modeling_granitemoeshared import (
    GraniteMoeSharedTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moestro.factorize.sidecar import ROUTER_SCALE

TOKENS, HIDDEN, EXPERTS, TOP_K = 4000, 64, 24, 6


def measured(router: torch.nn.Module, weight: torch.Tensor, scale: float) -> tuple[float, float]:
    """(share of tokens with the float64 choice, largest relative error of a gate)."""
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    (parameter,) = router.parameters()
    parameter.data = weight * scale
    with torch.inference_mode():
        _, gates, chosen = router(x)
    wanted = (x.double() @ weight.double().T).topk(TOP_K).indices.sort().values
    same = (chosen.sort().values == wanted).all(dim=1).double().mean()
    return float(same), float((gates * TOP_K - 1).abs().max())


def rows() -> torch.Tensor:
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_the_twins_gates_are_even_and_in_order() -> None:
    config = GraniteMoeSharedConfig(
        hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    same, error = measured(GraniteMoeSharedTopKRouter(config), rows(), ROUTER_SCALE)
    assert same >= 0.999
    assert error < 1e-6


def test_no_scale_does_both_behind_a_softmax_over_all() -> None:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=True
    )
    router = Qwen3MoeTopKRouter(config)
    found = [measured(router, rows(), 2.0**-power) for power in range(8, 31)]
    assert any(same >= 0.999 for same, _ in found)
    assert any(error < 1e-4 for _, error in found)
    assert not any(same >= 0.999 and error < 1e-4 for same, error in found), found
