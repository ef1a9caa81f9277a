"""Where a distillation stands, in a file: a run that was stopped goes on as if it had not been."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moestro.factorize.facts import FactorizeError

from .distill import Distillation

METADATA_KEY = "moestro.distillation"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class KeptFile:
    """`key` names everything that the run depends on: a file with another one is not its own."""

    path: Path
    key: str

    def keep(self, state: Distillation) -> None:
        """Writes the file whole or not at all. Raises OSError."""
        tensors = {name: tensor.detach() for name, tensor in _tensors(state)}
        facts = {"key": self.key, "done": state.done, "steps": state.steps}
        aside = self.path.with_name(self.path.name + ".partial")
        save_file(tensors, aside, {METADATA_KEY: json.dumps(facts)})
        aside.replace(self.path)

    def restore(self, state: Distillation) -> bool:
        """False where there is no file of this run. Raises FactorizeError where it is damaged."""
        if not self.path.exists():
            return False
        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()[METADATA_KEY])
                if facts["key"] != self.key:
                    return False
                _make_moments(state, int(facts["done"]))
                for name, tensor in _tensors(state):
                    tensor.detach().copy_(file.get_tensor(name))
                state.done, state.steps = int(facts["done"]), int(facts["steps"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FactorizeError(
                f"{self.path} does not continue this run ({error}); remove it to start anew"
            ) from error
        return True


def _make_moments(state: Distillation, steps: int) -> None:
    """Adam's own tensors, which it would make at its first step."""
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            state.optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}


def _tensors(state: Distillation) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and their moments, by group and place."""
    for number, group in enumerate(state.optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            yield f"{number}.{place}", parameter
            for name in MOMENTS:
                yield f"{number}.{place}.{name}", state.optimizer.state[parameter][name]
