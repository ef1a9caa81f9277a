"""A decoder layer of single tokens, but its experts, in two calls of the library.

Shape letters: T tokens (one of each sequence), H width, E experts, k of them per token.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from .library import ExpertCall, LayerCall, LayerStruct, TailCall
from .products import Activation, ExpertTable, Routed, Scratch, TileExpert, expert_call, loaded
from .step import AttentionWeights, Norm, Router, Rows


class LayerParts(NamedTuple):
    """What a layer is made of: norm, attention, norm, router, and an expert that all share."""

    first_norm: Norm
    attention: AttentionWeights
    second_norm: Norm
    router: Router
    shared: tuple[TileExpert, Activation] | None
    residual: float  # what is added to the stream is multiplied by it


class StepRoom:
    """Memory that the layers of one step use in turn, for T tokens."""

    def __init__(self, tokens: int, parts: LayerParts) -> None:
        experts, width = parts.router.matrix.shape
        self.tokens = tokens
        self.normed = torch.empty((tokens, width))
        self.logits = torch.empty((3 * tokens, experts))
        self.shares = torch.empty((tokens, parts.router.k))
        self.chosen = torch.empty((tokens, parts.router.k), dtype=torch.int64)
        self.shared = torch.empty((tokens, width))
        self.routed = Routed((0, tokens), range(tokens), range(tokens))


class LayerStep:
    """One layer's two calls. Valid as its parts are."""

    def __init__(self, parts: LayerParts, scratch: Scratch) -> None:
        self._parts, self._scratch = parts, scratch
        router = parts.router
        self._struct = LayerStruct(
            parts.attention.struct,
            parts.first_norm.weight.data_ptr(),
            parts.second_norm.weight.data_ptr(),
            router.matrix.data_ptr(),
            None if router.bias is None else router.bias.data_ptr(),
            parts.first_norm.eps,
            parts.second_norm.eps,
            parts.residual,
            router.matrix.shape[1],
            router.matrix.shape[0],
            router.k,
            int(router.normalized),
        )
        self._address = ctypes.addressof(self._struct)
        self._call, self._tail = LayerCall(), TailCall()
        self._room: StepRoom | None = None
        self._shared: ExpertCall | None = None
        self._ran: torch.Tensor | None = None  # what the shared expert gave since the last head
        self._library = loaded()

    def _settle(self, room: StepRoom) -> None:
        """The pointers that stay while the room does."""
        call, parts = self._call, self._parts
        call.normed, call.logits = room.normed.data_ptr(), room.logits.data_ptr()
        call.room = call.logits + 4 * room.tokens * room.logits.shape[1]
        call.shares, call.chosen = room.shares.data_ptr(), room.chosen.data_ptr()
        call.attention.count = room.tokens
        self._tail.count, self._tail.width = room.tokens, room.normed.shape[1]
        self._tail.residual = parts.residual
        if parts.shared is not None:
            expert, activation = parts.shared
            self._table = ExpertTable([expert])
            self._shared = expert_call(
                self._table, room.routed, room.normed, room.shared, self._scratch, activation
            )
        self._room = room

    def head(
        self,
        hidden: torch.Tensor,
        turns: tuple[int, int],
        buffers: tuple[torch.Tensor, torch.Tensor],
        rows: Rows,
        room: StepRoom,
    ) -> torch.Tensor:
        """fp32 [T, H], contiguous -> the stream after attention [T, H].

        What the experts read, their shares and their numbers are in `room` then. `turns` are the
        addresses of cosines and sines fp32 [T, R].
        """
        if room is not self._room:
            self._settle(room)
        stream, self._ran = torch.empty_like(hidden), None  # what a step that failed has left
        call, scratch = self._call, self._scratch
        inner = call.attention
        call.hidden, call.stream = hidden.data_ptr(), stream.data_ptr()
        inner.cos, inner.sin = turns
        inner.keys, inner.values = buffers[0].data_ptr(), buffers[1].data_ptr()
        inner.rows, inner.starts = rows.rows.data_ptr(), rows.starts.data_ptr()
        inner.pool_rows = buffers[0].shape[1]
        inner.scratch, inner.scratch_bytes = scratch.address, scratch.size_bytes
        while needed := self._library.moestro_layer_head(self._address, call):
            scratch.grow(needed)
            inner.scratch, inner.scratch_bytes = scratch.address, scratch.size_bytes
        return stream

    @property
    def shared_has_run(self) -> bool:
        """Since the last `head`."""
        return self._ran is not None

    def run_shared(self, given: torch.Tensor | None = None) -> None:
        """The shared expert of what `head` left in the room, where something else is waited for.

        `tail` runs it where nobody did. `given` [T, H], contiguous: what it gives is known.
        """
        shared, room = self._shared, self._room
        self._ran = given
        if given is None and shared is not None and room is not None:
            self._with_scratch(shared, self._library.moestro_experts, shared)
            self._ran = room.shared

    def tail(
        self, stream: torch.Tensor, experts: torch.Tensor, given: torch.Tensor | None = None
    ) -> None:
        """Add what the experts gave, fp32 [T, H], and the shared one gives, to the stream.

        `given` [T, H], contiguous, instead of the shared one's: the sum is the same to the bit.
        """
        tail, given, self._ran = self._tail, self._ran if given is None else given, None
        shared = self._shared if given is None else None
        tail.shared = None if shared is None else ctypes.addressof(shared)
        tail.given = None if given is None else given.data_ptr()
        tail.experts, tail.stream = experts.data_ptr(), stream.data_ptr()
        self._with_scratch(shared, self._library.moestro_layer_tail, tail)

    def _with_scratch(
        self, shared: ExpertCall | None, run: Callable[..., int], call: ctypes.Structure
    ) -> None:
        scratch = self._scratch
        if shared is not None:
            shared.scratch, shared.scratch_bytes = scratch.address, scratch.size_bytes
        while needed := run(call):
            assert shared is not None
            scratch.grow(needed)
            shared.scratch, shared.scratch_bytes = scratch.address, scratch.size_bytes
