"""What is an MLP whose neurons can be chosen, and what only looks like one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moestro.engine.neurons import mlp_of


def linear(outputs: int, inputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False)


class Gated(torch.nn.Module):
    """With the names and the order of most families."""

    def __init__(self, neurons: int = 48) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(neurons, 32), linear(neurons, 32)
        self.down_proj, self.act_fn = linear(32, neurons), torch.nn.GELU()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return out


class Numbered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = linear(48, 32), linear(32, 48), linear(48, 32)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.w2(F.silu(self.w1(rows)) * self.w3(rows))
        return out


class Joined(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = linear(96, 32), linear(32, 48)
        self.activation_fn = torch.nn.SiLU()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gates, ups = self.gate_up_proj(rows).chunk(2, dim=-1)
        out: torch.Tensor = self.down_proj(ups * self.activation_fn(gates))
        return out


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)
        self.act = torch.nn.ReLU()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(rows)))
        return out


@pytest.mark.parametrize("kind", [Gated, Numbered, Joined, Plain])
@torch.inference_mode()
def test_an_mlp_is_known_by_its_structure(kind: Callable[[], torch.nn.Module]) -> None:
    module = kind()
    found = mlp_of(module, torch.float32)
    assert found is not None and found.blocks == 3
    rows = torch.randn(4, 32)
    assert (found(rows) - module(rows)).abs().max() < 1e-6
    inner = found.activations(rows)
    assert inner.shape == (4, 48)
    every = found.copy([0, 1, 2])
    assert (every(rows) - module(rows)).abs().max() < 1e-6


class Clamped(Gated):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        ups = self.up_proj(rows).clamp(-0.1, 0.1)
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * ups)
        return out


class Scaled(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))


class Normed(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(48)


class OfTwo(Gated):
    def forward(self, rows: torch.Tensor, more: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(rows) + more


def without_weights() -> torch.nn.Module:
    """As what a text pass never runs: the tower of a vision model."""
    module = Gated()
    for each in (module.gate_proj, module.up_proj, module.down_proj):
        del each.weight
    return module


@pytest.mark.parametrize(
    "kind",
    [
        Clamped,
        Scaled,
        Normed,
        OfTwo,
        without_weights,
        lambda: Gated().to("meta"),
        lambda: Gated(40),
        lambda: torch.nn.Sequential(linear(32, 32), linear(32, 32)),
        lambda: linear(32, 32),
    ],
)
@torch.inference_mode()
def test_what_only_looks_like_one_stays_whole(kind: Callable[[], torch.nn.Module]) -> None:
    assert mlp_of(kind(), torch.float32) is None
