"""MLPs by their structure: down(act(gate(x)) * up(x)), or down(act(up(x))).

No family is named: the children have the names of such an MLP, and what is made of them gives what
the module gives, or the module stays as it is.

Shape letters: n rows, H width, W neurons.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moestro.engine.kernels import BLOCK, TileExpert
from moestro.engine.model import ThinMlp, agrees
from moestro.engine.selection import Copy
from moestro.engine.weights import TileLinear, beside

from .narrow import (
    Linear,
    device_of,
    inputs_bytes,
    is_linear,
    linear_at,
    outputs_bytes,
    with_inputs,
    with_outputs,
)

Activation = Callable[[torch.Tensor], torch.Tensor]


class _Names(NamedTuple):
    first: tuple[str, ...]  # gate and up, or one that gives both
    down: str
    gated: bool = True


STRUCTURES = (
    _Names(("gate_proj", "up_proj"), "down_proj"),
    _Names(("w1", "w3"), "w2"),
    _Names(("input_linear",), "output_linear"),
    _Names(("gate_up_proj",), "down_proj"),
    _Names(("up_proj",), "down_proj", gated=False),
    _Names(("fc1",), "fc2", gated=False),
)
ACTIVATIONS = ("act_fn", "activation", "activation_fn", "act")


class Mlp:
    """The parts of one, as they lie."""

    block = BLOCK  # neurons

    def __init__(
        self,
        first: Sequence[Linear],
        activation: Activation,
        down: Linear,
        *,
        gated: bool,
        thin: ThinMlp | None = None,
    ) -> None:
        """`first`: gate and up, one for both, or of an MLP without gate the one there is.

        `thin`: what computes all of it in one call, where that is known.
        """
        self._first, self._activation, self._down = tuple(first), activation, down
        self._gated, self._thin = gated, thin

    @property
    def blocks(self) -> int:
        return self._down.in_features // BLOCK

    def activations(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, W], what the down projection reads."""
        outputs: list[torch.Tensor] = [linear(rows) for linear in self._first]
        if not self._gated:
            return self._activation(outputs[0])
        gates, ups = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return self._activation(gates) * ups

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, H]"""
        found: torch.Tensor = self._down(self.activations(rows))
        return found

    def copy(self, kept: Sequence[int]) -> Copy:
        """Of these blocks of neurons: it gives what the whole gives with all others at zero."""
        rows = self._rows_of_first(kept)
        first = [with_outputs(linear, rows) for linear in self._first]
        down = with_inputs(self._down, kept)
        narrow = Mlp(first, self._activation, down, gated=self._gated)
        if self._thin is None:
            return narrow
        tiled = [each for each in first if isinstance(each, TileLinear)]
        assert isinstance(down, TileLinear) and len(tiled) == len(first)
        one = tiled[0].matrix if len(tiled) == 1 else beside(*tiled)
        expert = TileExpert.of(one, None, down.matrix, None)
        return ThinMlp(narrow, expert, self._thin.activation, self._thin.scratch)

    def copy_bytes(self, kept: int) -> int:
        """Of so many blocks."""
        both = kept * (2 if self._gated and len(self._first) == 1 else 1)
        first = sum(outputs_bytes(linear, both) for linear in self._first)
        return first + inputs_bytes(self._down, kept)

    def _rows_of_first(self, kept: Sequence[int]) -> list[int]:
        """Blocks of outputs: where one matrix gives gates and ups, the ups are its second half."""
        if self._gated and len(self._first) == 1:
            return [*kept, *(self.blocks + block for block in kept)]
        return list(kept)


def mlp_of(module: torch.nn.Module, dtype: torch.dtype) -> Mlp | None:
    """What `module` is, where it computes an MLP of whole blocks on rows of `dtype`.

    Its weights are there, and its `forward` may be the library's by now (ThinMlp).
    """
    children = dict(module.named_children())
    linears = {name for name, child in children.items() if is_linear(child)}
    others = [child for name, child in children.items() if name not in linears]
    if module._parameters or any(list(other.parameters()) for other in others):
        return None
    named = (getattr(module, name, None) for name in ACTIVATIONS)
    activation = next((each for each in named if callable(each)), F.silu)
    for names in STRUCTURES:
        if linears == {*names.first, names.down}:
            return _agreeing(module, names, activation, dtype)
    return None


def _agreeing(
    module: torch.nn.Module, names: _Names, activation: Activation, dtype: torch.dtype
) -> Mlp | None:
    first, down = [linear_at(module, name) for name in names.first], linear_at(module, names.down)
    stock = module.__dict__.get("forward")
    thin = stock if isinstance(stock, ThinMlp) else None
    found = Mlp(first, activation, down, gated=names.gated, thin=thin)
    given = down.in_features * (2 if names.gated and len(first) == 1 else 1)
    if down.in_features % BLOCK or {each.out_features for each in first} != {given}:
        return None
    rows = torch.randn((3, first[0].in_features), generator=torch.Generator().manual_seed(0))
    rows = rows.to(device_of(down), dtype)
    try:
        wanted = module(rows)
    except (AttributeError, TypeError):  # rows are not all that it takes
        return None
    if not isinstance(wanted, torch.Tensor) or wanted.shape != (len(rows), down.out_features):
        return None
    return found if agrees(found(rows), wanted, coarse=True) else None
