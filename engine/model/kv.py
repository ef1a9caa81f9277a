"""The attention state of running sequences, and the object that stock models call their cache.

Shape letters: H heads, S tokens of one sequence so far, T tokens of the packed row, D head width.
Knows no scheduling: who owns a `SequenceKV` decides how long it lives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class SequenceKV:
    """Keys and values of one sequence, one buffer [H, capacity, D] per layer, filled in order.

    Buffers appear at the first write of each layer. `length_tokens` counts what is committed:
    during a pass the rows behind it are being written and already readable by that pass.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.length_tokens = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put [H, n, D] behind the committed rows of `layer`."""
        if layer not in self._layers:
            self._layers[layer] = (self._buffer(keys), self._buffer(values))
        end = self.length_tokens + keys.shape[1]
        assert end <= self.capacity_tokens, "admission promised room for every token"
        held_keys, held_values = self._layers[layer]
        held_keys[:, self.length_tokens : end].copy_(keys)
        held_values[:, self.length_tokens : end].copy_(values)

    def read(self, layer: int, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [H, S, D], S = committed + `new_tokens`; valid until the next write."""
        end = self.length_tokens + new_tokens
        keys, values = self._layers[layer]
        return keys[:, :end], values[:, :end]

    def commit(self, new_tokens: int) -> None:
        self.length_tokens += new_tokens

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def numbers_per_token(self) -> int:
        """Numbers kept for one token by all layers that have written so far."""
        return sum(
            buffer.shape[0] * buffer.shape[2] for pair in self._layers.values() for buffer in pair
        )

    def _buffer(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((rows.shape[0], self.capacity_tokens, rows.shape[2]))


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in the packed row: [start, start + tokens)."""

    kv: SequenceKV
    start: int
    tokens: int


class PackedCache:
    """Stands where a transformers `Cache` would: `past_key_values` of a packed forward pass.

    `update` keeps each sequence's new rows. Layers whose attention receives the very tensors that
    `update` returned read the stored rows directly (no copy). Layers that expand them first
    (latent attention) need all rows back in one tensor: they are listed in `expanded_layers`.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.expanded_layers: set[int] = set()
        self.spans: tuple[Span, ...] = ()
        self.written: tuple[int, torch.Tensor | None] = (-1, None)  # last layer and returned keys
        self.masks: dict[tuple[int, int], torch.Tensor] = {}  # (rule, span) -> mask of this pass

    def begin(self, parts: Sequence[tuple[SequenceKV, int]]) -> None:
        """Start a pass over `parts`: (sequence, new tokens) in packed order."""
        spans, start = [], 0
        for kv, tokens in parts:
            spans.append(Span(kv, start, tokens))
            start += tokens
        self.spans = tuple(spans)
        self.masks.clear()

    def end(self, *, commit: bool) -> None:
        """Close the pass; with `commit` the new rows become part of their sequences."""
        if commit:
            for span in self.spans:
                span.kv.commit(span.tokens)
        self.spans = ()
        self.written = (-1, None)
        self.masks.clear()

    # What transformers calls -----------------------------------------------------------------

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys`, `values` [1, H, T, D] of the packed row's new tokens."""
        for span in self.spans:
            rows = slice(span.start, span.start + span.tokens)
            span.kv.write(layer_idx, keys[0, :, rows], values[0, :, rows])
        self.written = (layer_idx, keys)
        if layer_idx not in self.expanded_layers:
            return keys, values
        held = [span.kv.read(layer_idx, span.tokens) for span in self.spans]
        all_keys = torch.cat([pair[0] for pair in held], dim=1)[None]  # [1, H, sum S, D]
        all_values = torch.cat([pair[1] for pair in held], dim=1)[None]
        self.written = (layer_idx, None)
        return all_keys, all_values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always passed, so nobody needs the answer

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0
