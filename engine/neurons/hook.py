"""In place of an MLP's `forward`: the rows of sequences that keep some of its neurons, apart.

Shape letters: T rows of a pass, H width.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from moestro.engine.facts import index_on
from moestro.engine.model import StepPhase, ThinLayer

from .mlp import Mlp


class NeuronMlp:
    """A pass whose rows have nothing to do with neurons goes to what was there before.

    So do prompts. Those that are to choose compute their activations once more to be looked at.
    """

    def __init__(self, stock: Callable[..., Any], mlp: Mlp, layer: int, step: StepPhase) -> None:
        """`layer` of those whose neurons can be chosen."""
        self.stock, self._mlp, self._layer, self._step = stock, mlp, layer, step

    def __call__(self, *given: Any, **named: Any) -> Any:
        """[..., H] -> [..., H], of all T rows of the pass."""
        rows = self._step.rows
        if rows is None:
            return self.stock(*given, **named)
        (hidden,) = (*given, *named.values())
        flat = hidden.reshape(-1, hidden.shape[-1])
        if rows.looks:
            activations = self._mlp.activations
            rows.look_at_neurons(self._layer, self._mlp.block, lambda some: activations(flat[some]))
        out = self.apart(flat)
        return self.stock(*given, **named) if out is None else out.view(hidden.shape)

    def apart(self, flat: torch.Tensor) -> torch.Tensor | None:
        """[T, H] -> [T, H]; None where every row is computed with all neurons."""
        rows = self._step.rows
        copies = [] if rows is None else rows.copies(self._layer)
        if not copies:
            return None
        if len(copies[0][0]) == len(flat):  # one sequence, or answers to one prompt, alone
            return copies[0][1](flat)
        taken = {row for own, _ in copies for row in own}
        others = [row for row in range(len(flat)) if row not in taken]
        ways = [*copies, (others, self.stock)] if others else copies
        out = torch.empty_like(flat)
        for own, compute in ways:
            places = index_on(own, flat.device)
            out.index_copy_(0, places, compute(flat.index_select(0, places)))
        return out


def install(
    model: torch.nn.Module, found: Iterable[tuple[torch.nn.Module, Mlp]], step: StepPhase
) -> None:
    """Modules of `model` and what they are, numbered in this order."""
    hooks = dict[torch.nn.Module, NeuronMlp]()
    for layer, (module, mlp) in enumerate(found):
        hooks[module] = NeuronMlp(module.forward, mlp, layer, step)
        module.__dict__["forward"] = hooks[module]
    for module in model.modules():
        thin = module.__dict__.get("forward")
        if isinstance(thin, ThinLayer) and thin.shared in hooks:
            thin.shared_apart = hooks[thin.shared].apart
