"""A whole decoder layer with experts in two calls of the library, for steps of single tokens.

norm, attention, sum, norm, router | experts, wherever they are | sum, with a shared expert's

A layer is a candidate when its parts have been replaced (thin.py) and stand where they stand in
most families. It is trusted when it agreed with the stock layer in a step that ran both.

Shape letters: T tokens of the packed row, H width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moestro.engine.formats import is_experts_module
from moestro.engine.kernels import LayerParts, LayerStep, Scratch, StepRoom

from .experts import OffloadedExperts
from .kv import PackedCache
from .thin import (
    ThinAttention,
    ThinMlp,
    ThinNorm,
    ThinRouter,
    agrees,
    are_turns,
    fits,
    flat_turns,
)

RowsApart = Callable[[torch.Tensor], torch.Tensor | None]
"""What a shared expert gives for rows [T, H]; None where none of them goes a way of its own."""


class StepMemory:
    """What the layers of one model hand on during a step."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[int, int], StepRoom] = {}
        self._of: object = None
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None
        self._addresses = (0, 0)

    def room(self, tokens: int, parts: LayerParts) -> StepRoom:
        """For layers of the same shape, the same; of other steps' sizes none is kept."""
        key = (parts.router.k, len(parts.router.matrix))
        room = self._rooms.get(key)
        if room is None or room.tokens != tokens:
            room = self._rooms[key] = StepRoom(tokens, parts)
        return room

    def knows(self, turns: object) -> bool:
        """They are those of the pass, which another layer was given."""
        return turns is not None and turns is self._of

    def turns(self, given: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
        """Addresses of cosines and sines [T, R]; all layers of a pass are given the same ones."""
        if self._of is not given or self._turns is None:
            self._of, self._turns = given, flat_turns(given)
            self._addresses = (self._turns[0].data_ptr(), self._turns[1].data_ptr())
        return self._addresses

    @property
    def rotary(self) -> int:
        assert self._turns is not None
        return self._turns[0].shape[1]

    def forget(self) -> None:
        """A new pass begins."""
        self._of = None


class ThinLayer:
    """In place of a decoder layer's `forward`."""

    def __init__(
        self,
        stock: Callable[..., Any],
        parts: Callable[[int], LayerParts],
        attention: ThinAttention,
        experts: torch.nn.Module,
        cache: PackedCache,
        memory: StepMemory,
        scratch: Scratch,
        shared: torch.nn.Module | None,
    ) -> None:
        """`parts` tells them once it is known how many inputs of a head turn.

        `shared`: the expert that all tokens run, one of the parts.
        """
        self._stock, self._made = stock, parts
        self._attention, self._experts, self._cache = attention, experts, cache
        self._memory, self._scratch = memory, scratch
        self._parts: LayerParts | None = None
        self._step: LayerStep | None = None
        self.comparing, self.trusted = False, False
        self.shared = shared
        self.shared_apart: RowsApart | None = None

    def __call__(self, hidden_states: torch.Tensor, *others: Any, **keywords: Any) -> Any:
        """[1, T, H] -> [1, T, H]"""
        turns = keywords.get("position_embeddings")
        if (
            not (self.trusted or self.comparing)
            or others
            or self._cache.rows is None
            or not (self._memory.knows(turns) or are_turns(turns))
            or not fits(hidden_states)
            or keywords.get("attention_mask") is not None
            or keywords.get("past_key_values") is not self._cache
        ):
            return self._stock(hidden_states, *others, **keywords)
        assert turns is not None
        if not self.comparing:
            return self._run(hidden_states, turns)
        found = self._run(hidden_states.clone(), turns)
        out = self._stock(hidden_states, **keywords)
        coarse = not self._attention.is_float
        self.trusted = isinstance(out, torch.Tensor) and agrees(found, out, coarse=coarse)
        return out

    def _run(self, hidden: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        addresses, rows = self._memory.turns(turns), self._cache.rows
        assert rows is not None
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        if self._step is None or self._parts is None:
            self._parts = self._made(self._memory.rotary)
            self._step = LayerStep(self._parts, self._scratch)
        room = self._memory.room(flat.shape[0], self._parts)
        stream = self._step.head(flat, addresses, self._attention.buffers(), rows, room)
        experts = self._experts.__dict__["moestro_experts"]
        chosen = room.normed, room.chosen, room.shares
        if isinstance(experts, OffloadedExperts):
            routed = experts(self._experts, *chosen, partial(self._run_shared, room.normed))
        else:
            routed = experts(self._experts, *chosen)
        given = None if self._step.shared_has_run else self._rows_apart(room.normed)
        self._step.tail(stream, routed.contiguous(), given)
        return stream.view(hidden.shape)

    def _run_shared(self, normed: torch.Tensor) -> None:
        """The shared expert, while others are being read."""
        assert self._step is not None
        self._step.run_shared(self._rows_apart(normed))

    def _rows_apart(self, normed: torch.Tensor) -> torch.Tensor | None:
        given = None if self.shared_apart is None else self.shared_apart(normed)
        return None if given is None else given.contiguous()


def layer_of(
    layer: torch.nn.Module, cache: PackedCache, memory: StepMemory, scratch: Scratch
) -> ThinLayer | None:
    """A candidate for `layer`, whose parts have been replaced."""
    thin = {name: each.__dict__.get("forward") for name, each in layer.named_modules()}
    kinds: dict[type, list[Any]] = {
        kind: [each for each in thin.values() if isinstance(each, kind)]
        for kind in (ThinNorm, ThinAttention, ThinRouter, ThinMlp)
    }
    own = [thin.get(name) for name, _ in layer.named_children()]
    norms = [each for each in own if isinstance(each, ThinNorm)]
    experts = [each for each in layer.modules() if is_experts_module(each)]
    attentions, routers, mlps = (kinds[kind] for kind in (ThinAttention, ThinRouter, ThinMlp))
    if [len(norms), len(attentions), len(routers), len(experts)] != [2, 1, 1, 1] or len(mlps) > 1:
        return None
    shared = (mlps[0].expert, mlps[0].activation) if mlps else None
    shared_path = next((name for name, each in thin.items() if each in mlps), None)
    shared_module = None if shared_path is None else layer.get_submodule(shared_path)
    residual = getattr(layer, "residual_multiplier", 1.0)

    def parts(rotary: int) -> LayerParts:
        return LayerParts(
            norms[0].norm,
            attentions[0].weights(rotary),
            norms[1].norm,
            routers[0].router,
            shared,
            float(residual),
        )

    found = (attentions[0], experts[0], cache, memory, scratch, shared_module)
    return ThinLayer(layer.forward, parts, *found)
