"""Which routers tell the order of all experts."""

from typing import Any

import torch

from moestro.engine.selection import ranking_of


class Softmax(torch.nn.Module):
    """(logits, shares, ids), as most families' routers give them."""

    def __init__(self, normalized: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 16))
        self.top_k, self.normalized = 2, normalized

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = rows @ self.weight.t()
        shares, ids = logits.softmax(1).topk(self.top_k, dim=1)
        if self.normalized:
            shares = shares / shares.sum(1, keepdim=True)
        return logits, shares, ids


class OtherWeights(Softmax):
    """Weights that are no longer in proportion when all are asked for."""

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, shares, ids = super().forward(rows)
        return logits, (shares - shares.min(1, keepdim=True).values + 0.1), ids


class NoOrder(Softmax):
    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, shares, ids = super().forward(rows)
        return logits, shares.flip(1), ids.flip(1)


class Deaf(Softmax):
    """Its number of experts is written elsewhere."""

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shares, ids = (rows @ self.weight.t()).softmax(1).topk(2, dim=1)
        return rows, shares, ids


def found(router: Any, num_experts: int = 6) -> Any:
    with torch.inference_mode():
        return ranking_of(router, 2, {}, num_experts)


def test_a_softmax_router_tells_it_and_is_as_it_was():
    for normalized in (True, False):
        router = Softmax(normalized)
        ranking, rows = found(router), torch.randn(5, 16)
        with torch.inference_mode():
            ids, weights = ranking(rows)
            order = (rows @ router.weight.t()).argsort(dim=1, descending=True)
            for at, row in enumerate(rows):  # whoever is in company
                alone = ranking(row[None])
                assert torch.equal(alone[0][0], ids[at]) and torch.equal(alone[1][0], weights[at])
        assert torch.equal(ids, order)
        assert router.top_k == 2


def test_others_do_not():
    assert found(OtherWeights()) is None
    assert found(NoOrder()) is None
    assert found(Deaf()) is None
    assert found(Softmax(), num_experts=5) is None
    assert found(torch.nn.Linear(16, 6)) is None
