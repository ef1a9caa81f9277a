"""What a step does beside its products, on tensors: norms and attention.

Shape letters: T tokens (one of each sequence), H inputs and outputs of the module, D width of a
head, R its inputs that turn with the position.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .library import (
    AttendCall,
    AttentionCall,
    AttentionStruct,
    PromptCall,
    RouteCall,
    library,
)
from .products import Scratch, TileMatrix, loaded

MOST_GROUP = 64  # query heads that share a key head
LANES = 16  # a head's width is a multiple of them
WIDEST_HEAD = 256  # of a prompt's attention


class AttentionWeights(NamedTuple):
    """One attention module, as it lies; valid as its tensors are."""

    struct: AttentionStruct
    held: tuple[object, ...]  # what the struct points to
    outputs: int


class Heads(NamedTuple):
    """The shape of an attention module."""

    heads: int
    key_heads: int
    dim: int
    scaling: float


class Norm(NamedTuple):
    """An RMS norm: fp32 [width], and what is added to the mean of the squares."""

    weight: torch.Tensor
    eps: float


def tile_attention(
    projections: Sequence[tuple[TileMatrix, torch.Tensor | None]],
    norms: tuple[Norm, Norm] | None,
    heads: tuple[int, int, int, float],
    rotary: int,
) -> AttentionWeights:
    """Query, key, value and output, each with its bias or None; norms of queries and keys.

    `heads`: how many, how many of keys, their width, the scores' factor.
    """
    shape = Heads(*heads)
    biases = [None if bias is None else bias.data_ptr() for _, bias in projections]
    query_norm, key_norm = norms or (None, None)
    struct = AttentionStruct(
        *(matrix.struct for matrix, _ in projections),
        *biases,
        None if query_norm is None else query_norm.weight.data_ptr(),
        None if key_norm is None else key_norm.weight.data_ptr(),
        0 if query_norm is None else len(query_norm.weight),
        0 if key_norm is None else len(key_norm.weight),
        shape.heads,
        shape.key_heads,
        shape.dim,
        rotary,
        0.0 if query_norm is None else query_norm.eps,
        shape.scaling,
    )
    return AttentionWeights(struct, (tuple(projections), norms), projections[3][0].outputs)


class Rows(NamedTuple):
    """Where the tokens of each sequence lie in the buffers of every layer."""

    rows: torch.Tensor  # int32 [sum of lengths]: one sequence behind the other
    starts: torch.Tensor  # int64 [T + 1]


def attend(
    weights: AttentionWeights,
    hidden: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    buffers: tuple[torch.Tensor, torch.Tensor],
    rows: Rows,
    scratch: Scratch,
) -> torch.Tensor:
    """fp32 [T, H] -> [T, H]. Writes each new token's key and value where `rows` ends.

    `turns`: cosines and sines fp32 [T, R]; `buffers`: keys and values fp32 [heads, rows, D].
    """
    out = torch.empty((hidden.shape[0], weights.outputs))
    _attend_with("moestro_attention", weights, hidden, turns, buffers, rows, scratch, out)
    return out


def place(
    weights: AttentionWeights,
    hidden: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    buffers: tuple[torch.Tensor, torch.Tensor],
    rows: Rows,
    scratch: Scratch,
) -> torch.Tensor:
    """fp32 [T, H] -> the queries [T, heads, D], turned and scaled: what `attend` does before.

    Tokens of prompts, too: `rows` has one row for each token.
    """
    heads, dim = weights.struct.heads, weights.struct.dim
    out = torch.empty((hidden.shape[0], heads, dim))
    _attend_with("moestro_place", weights, hidden, turns, buffers, rows, scratch, out)
    return out


def _attend_with(
    name: str,
    weights: AttentionWeights,
    hidden: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor],
    buffers: tuple[torch.Tensor, torch.Tensor],
    rows: Rows,
    scratch: Scratch,
    out: torch.Tensor,
) -> None:
    keys, values = buffers
    call = AttentionCall(
        hidden.data_ptr(),
        turns[0].data_ptr(),
        turns[1].data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        rows.rows.data_ptr(),
        rows.starts.data_ptr(),
        out.data_ptr(),
        keys.shape[1],
        scratch.address,
        scratch.size_bytes,
        hidden.shape[0],
    )
    run, address = getattr(loaded(), name), ctypes.addressof(weights.struct)
    while needed := run(address, call):
        scratch.grow(needed)
        call.scratch, call.scratch_bytes = scratch.address, scratch.size_bytes


def attend_stored(
    queries: torch.Tensor, buffers: tuple[torch.Tensor, torch.Tensor], rows: Rows
) -> torch.Tensor:
    """fp32 [T, heads, D], contiguous, turned and scaled -> the same shape.

    What `attend` gives, where the new keys and values lie in `buffers` [key heads, rows, D].
    """
    out = torch.empty_like(queries)
    keys, values = buffers
    call = AttendCall(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        rows.rows.data_ptr(),
        rows.starts.data_ptr(),
        out.data_ptr(),
        keys.shape[1],
        *queries.shape[:2],
        keys.shape[0],
        queries.shape[2],
    )
    loaded().moestro_attend(call)
    return out


def attends_prompts(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `attend_prompt` takes such."""
    if library() is None:
        return False
    for each in (queries, keys, values):
        width = each.shape[-1]
        if each.dtype != torch.float32 or each.device.type != "cpu" or each.stride(-1) != 1:
            return False
        if width % LANES or width > WIDEST_HEAD:
            return False
    return True


def attend_prompt(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 [heads, T, D], [key heads, S, D] and [key heads, S, Dv] -> [T, heads, Dv].

    Into `out`, contiguous, where it is given. The T tokens are the last ones of S, and see those
    before them. A token's result does not depend by a bit on which others are in the call.
    """
    (heads, tokens, dim), (key_heads, length, value_dim) = queries.shape, values.shape
    out = torch.empty((tokens, heads, value_dim)) if out is None else out
    states = torch.empty((heads, tokens, 2))
    call = PromptCall(
        *(each.data_ptr() for each in (queries, keys, values, out, states)),
        *(stride for each in (queries, keys, values) for stride in each.stride()[:2]),
        tokens,
        length,
        heads,
        key_heads,
        dim,
        value_dim,
        scaling,
    )
    loaded().moestro_attend_prompt(call)
    return out


def normalize(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """fp32 [n, width], contiguous -> the same shape: each row by its root mean square."""
    out = torch.empty_like(rows)
    loaded().moestro_normalize(
        rows.data_ptr(),
        norm.weight.data_ptr(),
        norm.eps,
        rows.shape[0],
        rows.shape[1],
        out.data_ptr(),
    )
    return out


class Router(NamedTuple):
    """By softmax: of E logits the k largest, whose shares add up to one if `normalized`."""

    matrix: torch.Tensor  # fp32 [E, H]
    bias: torch.Tensor | None  # fp32 [E]
    k: int
    normalized: bool


def route(rows: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [n, H], contiguous -> logits [n, E], shares [n, k] and experts int64 [n, k]."""
    (count, inputs), experts = rows.shape, router.matrix.shape[0]
    room = torch.empty((3 * count, experts))
    shares = torch.empty((count, router.k))
    chosen = torch.empty((count, router.k), dtype=torch.int64)
    call = RouteCall(
        rows.data_ptr(),
        router.matrix.data_ptr(),
        None if router.bias is None else router.bias.data_ptr(),
        room.data_ptr(),
        shares.data_ptr(),
        room.data_ptr() + 4 * count * experts,
        chosen.data_ptr(),
        count,
        inputs,
        experts,
        router.k,
        int(router.normalized),
    )
    loaded().moestro_route(call)
    return room[:count], shares, chosen
