"""Whose neurons a prompt may choose: MLPs that a pass runs once, on the rows of all sequences."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moestro.engine.lanes import LanePart
from moestro.engine.sequence_neurons import choosable_mlps

WIDTH = 32


class Gated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(WIDTH, 48) for _ in range(2))
        self.down_proj, self.act_fn = torch.nn.Linear(48, WIDTH), torch.nn.SiLU()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return out


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never = Gated(), Gated(), Gated()
        self.by_sequence, self.of_some_rows, self.experts = Gated(), Gated(), Gated()

    def forward(self, rows: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
        rows = self.experts(self.twice(self.twice(self.once(rows))))
        for own in torch.tensor_split(rows, list(starts[1:])):
            self.by_sequence(own)
        return rows + self.of_some_rows(rows[:2]).sum()


class Lane:
    """A lane whose passes are of `Model`."""

    keeps_states = False

    def __init__(self, *, packs: bool) -> None:
        self.model, self.packs = Model(), packs
        self.held: set[tuple[int, int]] = set()

    def run(self, parts: Sequence[LanePart], keep: Sequence[int]) -> torch.Tensor:
        self.held |= {part.key for part in parts}
        starts = [sum(len(part.ids) for part in parts[:at]) for at in range(len(parts))]
        rows = torch.ones(sum(len(part.ids) for part in parts), WIDTH)
        found: torch.Tensor = self.model(rows, starts)
        return found[list(keep)]

    def forget(self, key: tuple[int, int]) -> None:
        self.held.remove(key)


def blueprint(room: object = None) -> Any:
    device = SimpleNamespace(room=room, compute_dtype=torch.float32)
    return SimpleNamespace(device=device, topology=SimpleNamespace(experts_paths=("experts",)))


@pytest.mark.parametrize(("packs", "wanted"), [(True, ["once"]), (False, ["once", "by_sequence"])])
def test_whoever_sees_other_rows_stays_whole(packs: bool, wanted: list[str]) -> None:
    lane: Any = Lane(packs=packs)
    found = choosable_mlps(blueprint(), lane)
    assert list(found) == [getattr(lane.model, name) for name in wanted]
    assert not lane.held


def test_a_device_with_memory_of_its_own_has_none() -> None:
    lane: Any = Lane(packs=True)
    assert choosable_mlps(blueprint(room=object()), lane) == {}
