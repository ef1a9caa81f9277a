"""The attention state of running sequences, and the object that stock models call their cache.

Shape letters: H heads, S tokens of one sequence so far, T tokens of the packed row, D head width.
Knows no scheduling: whose a page is, and how long, is decided elsewhere.
"""

import copy
import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moestro.engine.facts import PAGE_TOKENS
from moestro.engine.kernels import Rows


class KVStore:
    """The rows of all pages: per layer one buffer of keys and one of values, [H, rows, D].

    Page p is rows [p * PAGE_TOKENS, (p + 1) * PAGE_TOKENS) of every buffer. A buffer is asked for
    at the first write of its layer; on the host it takes memory where it is written, and no more.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(
        self, index: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of a layer that is about to keep `keys` and `values` [H, n, D]."""
        if index not in self.layers:
            self.layers[index] = (self._buffer(keys), self._buffer(values))
        return self.layers[index]

    def give_back(self, pages: Sequence[int]) -> None:
        """The memory of pages that nobody reads any more, until one is written again.

        What was written once would be held for good. On Linux hosts alone: elsewhere it is.
        """
        for buffer in (each for pair in self.layers.values() for each in pair):
            if buffer.device.type != "cpu":
                continue
            row_bytes = buffer.shape[2] * buffer.itemsize
            for first, length in _runs_of(pages):
                for head in range(buffer.shape[0]):
                    row = head * buffer.shape[1] + first
                    _give_back(buffer.data_ptr() + row * row_bytes, length * row_bytes)

    @property
    def numbers_per_token(self) -> int:
        """Numbers kept for one token by all layers that have written so far."""
        return sum(
            buffer.shape[0] * buffer.shape[2] for pair in self.layers.values() for buffer in pair
        )

    def _buffer(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((rows.shape[0], self.pages * PAGE_TOKENS, rows.shape[2]))


class SequenceKV:
    """Keys and values of one sequence: rows of the pages that it was given, filled in order.

    `length_tokens` counts what is committed: during a pass the rows behind it are being written
    and already readable by that pass.
    """

    def __init__(self, store: KVStore, pages: Sequence[int]) -> None:
        self.store = store
        self.length_tokens = 0
        self.state: Any = None  # of modules that keep one beside keys and values
        self._runs = _runs_of(pages)

    @classmethod
    def alone(cls, capacity_tokens: int) -> "SequenceKV":
        """With a store of its own."""
        pages = -(-capacity_tokens // PAGE_TOKENS)
        return cls(KVStore(pages), range(pages))

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put [H, n, D] behind the committed rows of `layer`."""
        held_keys, held_values = self.store.layer(layer, keys, values)
        done = 0
        for rows in self._rows(self.length_tokens, self.length_tokens + keys.shape[1]):
            part = slice(done, done + rows.stop - rows.start)
            held_keys[:, rows].copy_(keys[:, part])
            held_values[:, rows].copy_(values[:, part])
            done = part.stop
        assert done == keys.shape[1], "admission promised room for every token"

    def read(self, layer: int, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, S, D], S = committed + `new_tokens`; valid until the next write.

        A view where the pages follow each other, else a copy.
        """
        keys, values = self.store.layers[layer]
        rows = list(self._rows(0, self.length_tokens + new_tokens))
        if len(rows) == 1:
            return keys[:, rows[0]], values[:, rows[0]]
        return (
            torch.cat([keys[:, part] for part in rows], 1),
            torch.cat([values[:, part] for part in rows], 1),
        )

    def commit(self, new_tokens: int) -> None:
        self.length_tokens += new_tokens

    def fork(self, pages: Sequence[int]) -> "SequenceKV":
        """The same tokens so far, on `pages`, which begin with the whole pages of this one.

        The rows of the last page, which is not full and which each will go on in, are copied.
        """
        twin = SequenceKV(self.store, pages)
        twin.length_tokens = self.length_tokens
        twin.state = copy.deepcopy(self.state)
        whole = self.length_tokens // PAGE_TOKENS * PAGE_TOKENS
        if whole < self.length_tokens:
            (old,) = self._rows(whole, self.length_tokens)
            (new,) = twin._rows(whole, self.length_tokens)
            for pair in self.store.layers.values():
                for buffer in pair:
                    buffer[:, new].copy_(buffer[:, old])
        return twin

    def rows(self, end: int) -> torch.Tensor:
        """int32 [end]: the row of the store that each of its first tokens has."""
        parts = [torch.arange(r.start, r.stop, dtype=torch.int32) for r in self._rows(0, end)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, start: int, end: int) -> Iterator[slice]:
        """Rows of the store that hold this sequence's tokens [start, end), in order."""
        passed = 0
        for first, length in self._runs:
            low, high = max(start, passed), min(end, passed + length)
            if low < high:
                yield slice(first + low - passed, first + high - passed)
            passed += length


def _runs_of(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Pages that follow each other as (first row, rows)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and sum(runs[-1]) == page * PAGE_TOKENS:
            runs[-1] = (runs[-1][0], runs[-1][1] + PAGE_TOKENS)
        else:
            runs.append((page * PAGE_TOKENS, PAGE_TOKENS))
    return runs


def _give_back(address: int, size_bytes: int) -> None:
    """Whole pages of the system inside, which read as zeros from then on."""
    if not sys.platform.startswith("linux"):
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + size_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole > 0:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(whole), mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in the packed row: [start, start + tokens)."""

    kv: SequenceKV
    start: int
    tokens: int


class SingleTokens(NamedTuple):
    """The sequences of a pass that have one new token."""

    at: torch.Tensor  # int64 [n]: their rows in the packed row
    rows: Rows  # where their tokens lie
    store: KVStore  # in it


def _single_tokens(spans: Sequence[Span]) -> SingleTokens | None:
    """None where there are none, or where they lie in several stores."""
    singles = [span for span in spans if span.tokens == 1]
    if not singles or any(span.kv.store is not singles[0].kv.store for span in singles):
        return None
    each = [span.kv.rows(span.kv.length_tokens + 1) for span in singles]
    rows = Rows(torch.cat(each), torch.tensor([0, *map(len, each)]).cumsum(0))
    at = torch.tensor([span.start for span in singles])
    return SingleTokens(at, rows, singles[0].kv.store)


def _placed_tokens(spans: Sequence[Span]) -> Rows | None:
    """The row of each new token of a pass; None where they lie in several stores."""
    if not spans or any(span.kv.store is not spans[0].kv.store for span in spans):
        return None
    ends = [span.kv.length_tokens + span.tokens for span in spans]
    rows = [span.kv.rows(end)[-span.tokens :] for span, end in zip(spans, ends, strict=True)]
    return Rows(torch.cat(rows), torch.arange(sum(map(len, rows)) + 1))


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
        self.first_seen: dict[tuple[int, int], int | None] = {}  # (rule, span) -> of this pass
        self.ruled = False  # some masks are rules of the model's own, not plain causality
        self.grouped_heads = True  # the device's kernels take key heads that query heads share
        self.block_masks = False  # masks are tensors over the whole row: the model reads them
        self.forgets: list[Callable[[], None]] = []  # called when a pass begins
        self.attended_by_library: set[int] = set()
        """Layers whose single tokens the library attends for, whatever else is in a pass."""
        self.singles: SingleTokens | None = None
        self.rows: Rows | None = None
        """Where all tokens lie, in a pass of one new token of each sequence."""
        self.placed: Rows | None = None
        """Where the new tokens lie, in any other pass whose sequences share a store."""

    def begin(self, parts: Sequence[tuple[SequenceKV, int]]) -> None:
        """Start a pass over `parts`: (sequence, new tokens) in packed order."""
        spans, start = [], 0
        for kv, tokens in parts:
            spans.append(Span(kv, start, tokens))
            start += tokens
        self.spans = tuple(spans)
        self.masks.clear()
        self.first_seen.clear()
        self.singles = _single_tokens(self.spans)
        alone = self.singles is not None and len(self.singles.at) == len(self.spans)
        self.rows = self.singles.rows if alone and self.singles is not None else None
        self.placed = None if alone else _placed_tokens(self.spans)
        for forget in self.forgets:
            forget()

    def end(self, *, commit: bool) -> None:
        """Close the pass; with `commit` the new rows become part of their sequences."""
        if commit:
            for span in self.spans:
                span.kv.commit(span.tokens)
        self.spans = ()
        self.written = (-1, None)
        self.masks.clear()
        self.first_seen.clear()
        self.singles = self.rows = self.placed = None

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

    def update_indexer(self, keys: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """`keys` [1, T, D] by which an indexer chooses -> those of all tokens [1, sum S, D]."""
        name, rows = -1 - layer_idx, keys[0][None]  # one head
        none = rows[:, :, :0]
        for span in self.spans:
            new = slice(span.start, span.start + span.tokens)
            span.kv.write(name, rows[:, new], none[:, new])
        held = [span.kv.read(name, span.tokens)[0] for span in self.spans]
        return torch.cat(held, dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always passed, so nobody needs the answer

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0
