"""Norms, routers, attention and whole layers of single tokens against plain torch."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from moestro.engine.kernels import (
    AttentionWeights,
    LayerParts,
    LayerStep,
    Norm,
    Router,
    Rows,
    Scratch,
    StepRoom,
    TileFormat,
    attend,
    attend_stored,
    encode,
    normalize,
    route,
    set_pool_threads,
    tile_attention,
    tile_matrix,
)
from moestro.engine.kernels.products import SILU_MUL, TileExpert

WIDTH, PAGE, POOL_ROWS = 48, 16, 2048
LENGTHS = (1, 15, 64, 65, 200)
FLOAT32 = TileFormat("float32")


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def rms(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    exact = rows.double()
    mean = exact.pow(2).mean(-1, keepdim=True)
    return exact * torch.rsqrt(mean + norm.eps) * norm.weight.double()


class Module(NamedTuple):
    """An attention module and what the reference needs of it."""

    weights: AttentionWeights
    matrices: Sequence[torch.Tensor]  # query, key, value, output [N, K]
    biases: Sequence[torch.Tensor | None]
    norms: tuple[Norm, Norm] | None
    heads: int
    key_heads: int
    dim: int
    rotary: int


@lru_cache
def module(
    heads: int, key_heads: int, dim: int, rotary: int, norms: str = "none", bias: bool = False
) -> Module:
    sizes = [(heads * dim, WIDTH), *[(key_heads * dim, WIDTH)] * 2, (WIDTH, heads * dim)]
    matrices = [torch.randn(size) / size[1] ** 0.5 for size in sizes]
    biases = [torch.randn(size[0]) if bias else None for size in sizes]
    tiles = [tile_matrix(encode(each, FLOAT32), FLOAT32, *each.shape) for each in matrices]
    both = None
    if norms != "none":
        widths = (dim, dim) if norms == "heads" else (heads * dim, key_heads * dim)
        both = Norm(torch.rand(widths[0]) + 0.5, 1e-6), Norm(torch.rand(widths[1]) + 0.5, 1e-6)
    shape = (heads, key_heads, dim, dim**-0.5)
    weights = tile_attention(list(zip(tiles, biases, strict=True)), both, shape, rotary)
    return Module(weights, matrices, biases, both, heads, key_heads, dim, rotary)


def turned(rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """[heads, D] at one position."""
    rotary = len(cosines)
    first, rest = rows[:, :rotary], rows[:, rotary:]
    exchanged = torch.cat([-first[:, rotary // 2 :], first[:, : rotary // 2]], 1)
    return torch.cat([first * cosines + exchanged * sines, rest], 1)


class Case:
    """One step: a new token of each sequence, on pages wherever `placed` says."""

    def __init__(self, m: Module, lengths: Sequence[int], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module, self.lengths = m, lengths
        self.hidden = torch.randn(len(lengths), WIDTH)
        angles = torch.rand(len(lengths), m.rotary // 2) * 6
        self.turns = tuple(torch.cat([f(angles)] * 2, 1) for f in (torch.cos, torch.sin))
        shape = (m.key_heads, m.dim)
        self.past = [torch.randn(2, length - 1, *shape) for length in lengths]

    def run(self, pages: Sequence[int], scratch: Scratch | None = None) -> torch.Tensor:
        """`pages` in the order in which the sequences take them."""
        m, free = self.module, iter(pages)
        buffers = torch.full((2, m.key_heads, POOL_ROWS, m.dim), float("nan"))
        each = []
        for past, length in zip(self.past, self.lengths, strict=True):
            own = [next(free) for _ in range(-(-length // PAGE))]
            rows = torch.cat([torch.arange(p * PAGE, (p + 1) * PAGE) for p in own])[:length]
            buffers[:, :, rows[:-1]] = past.transpose(1, 2)
            each.append(rows.int())
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        self.buffers, self.places = buffers, Rows(torch.cat(each), ends)
        return attend(
            m.weights,
            self.hidden,
            (self.turns[0], self.turns[1]),
            (buffers[0], buffers[1]),
            self.places,
            scratch or Scratch(),
        )

    def wanted(self) -> torch.Tensor:
        return torch.stack([self._one(t) for t in range(len(self.lengths))])

    def _one(self, t: int) -> torch.Tensor:
        m = self.module
        row = self.hidden[t : t + 1].double()
        biases = [None if bias is None else bias.double() for bias in m.biases]
        query, key, value = (F.linear(row, m.matrices[i].double(), biases[i])[0] for i in range(3))
        cosines, sines = (each[t].double() for each in self.turns)
        if m.norms is not None:
            query, key = (
                rms(each.view(-1, len(norm.weight)), norm).flatten()
                for each, norm in zip((query, key), m.norms, strict=True)
            )
        query = turned(query.view(m.heads, m.dim), cosines, sines)
        key = turned(key.view(m.key_heads, m.dim), cosines, sines)
        keys = torch.cat([self.past[t][0].double(), key[None]])
        values = torch.cat([self.past[t][1].double(), value.view(1, m.key_heads, m.dim)])
        group = m.heads // m.key_heads
        keys, values = (each.repeat_interleave(group, 1) for each in (keys, values))  # [S, H, D]
        scores = torch.einsum("hd,shd->hs", query, keys) * m.dim**-0.5
        mixed = torch.einsum("hs,shd->hd", scores.softmax(1), values)
        return F.linear(mixed.flatten(), m.matrices[3].double(), biases[3])


STRAIGHT = list(range(POOL_ROWS // PAGE))
SHAPES = {
    "group of 1": (2, 2, 16, 16, "none", True),
    "group of 3, part turns, a norm per head": (6, 2, 64, 24, "heads", False),
    "group of 8, norms of all heads": (8, 1, 128, 128, "whole", False),
    "nothing turns": (2, 1, 32, 0, "none", False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_torch_wherever_pages_lie(shape: str, instruction_set: str) -> None:
    torch.manual_seed(1)
    case = Case(module(*SHAPES[shape]), LENGTHS)
    found = case.run(STRAIGHT)
    assert close(found, case.wanted())
    others = torch.randperm(len(STRAIGHT), generator=torch.Generator().manual_seed(2)).tolist()
    for pages in (STRAIGHT[::-1], others, [*STRAIGHT[9:13], *STRAIGHT[40:], *STRAIGHT[13:40]]):
        assert torch.equal(case.run(pages), found)


@pytest.mark.parametrize("norms", ["heads", "whole"])
def test_a_norm_of_keys_touches_keys_alone(norms: str, instruction_set: str) -> None:
    """Fewer heads of keys than of queries: what lies behind the last key stays."""
    torch.manual_seed(1)
    case = Case(module(6, 2, 16, 16, norms), (3, 2))
    found = case.run(STRAIGHT)
    assert close(found, case.wanted())
    written = [int(case.places.rows[end - 1]) for end in case.places.starts[1:]]
    values = torch.stack([case.buffers[1][:, row].flatten() for row in written])
    assert close(values, case.hidden.double() @ case.module.matrices[2].double().T)
    assert int(torch.isfinite(case.buffers[0]).all(2).sum()) == 2 * (3 + 2)  # and no other row


def test_attention_has_no_company_and_no_threads(instruction_set: str) -> None:
    torch.manual_seed(1)
    lengths = [(37 * t) % 160 + 1 for t in range(16)]
    both = module(8, 4, 16, 16, "heads", True)
    assert sum(lengths) * both.key_heads > 4096  # fewer are not dealt out
    together = Case(both, lengths)
    wanted = together.run(STRAIGHT)
    try:
        assert set_pool_threads(2) == 2
        assert torch.equal(together.run(STRAIGHT), wanted)
    finally:
        set_pool_threads(1)
    for count in (1, 2, 3, 7):
        fewer = Case(both, lengths)
        fewer.lengths, fewer.past = lengths[:count], fewer.past[:count]
        fewer.hidden = fewer.hidden[:count].contiguous()
        fewer.turns = tuple(each[:count].contiguous() for each in fewer.turns)
        assert torch.equal(fewer.run(STRAIGHT), wanted[:count])


def test_attention_alone_is_that_of_torch(instruction_set: str) -> None:
    """What passes with prompts among them take for their single tokens."""
    torch.manual_seed(1)
    case = Case(module(6, 2, 64, 24), LENGTHS)
    case.run(STRAIGHT)  # fills keys and values
    queries = torch.randn(len(LENGTHS), 6, 64)
    keys, values = case.buffers
    found = attend_stored(queries, (keys, values), case.places)
    for t, (start, end) in enumerate(pairwise(case.places.starts.tolist())):
        rows = case.places.rows[start:end]
        wanted = F.scaled_dot_product_attention(
            queries[t, :, None].double(),
            keys[:, rows].double().repeat_interleave(3, 0),
            values[:, rows].double().repeat_interleave(3, 0),
            scale=1.0,
        )
        assert close(found[t], wanted[:, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "key", "value"])
def test_attention_keeps_what_is_no_number(where: str, value: float, instruction_set: str) -> None:
    torch.manual_seed(1)
    case = Case(module(4, 2, 16, 16, "heads"), (70, 70, 5))
    if where == "hidden":
        case.hidden[1, 7] = value
    else:
        case.past[1][int(where == "value"), 66] = value
    found = case.run(STRAIGHT)
    assert torch.isfinite(found[[0, 2]]).all()
    assert not torch.isfinite(found[1]).all()


@pytest.mark.parametrize("width", [1, 15, 16, 100, 256])
def test_norms(width: int, instruction_set: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, width) * torch.tensor([[1e-4], [0.1], [1], [30], [1000]])
    norm = Norm(torch.randn(width), 1e-5)
    assert close(normalize(rows, norm), rms(rows, norm))
    rows[2, width - 1] = float("nan")
    found = normalize(rows, norm)
    assert found[2].isnan().all() and torch.isfinite(found[[0, 1, 3, 4]]).all()


def test_a_router_has_no_company_and_no_threads(instruction_set: str) -> None:
    torch.manual_seed(0)
    rows, router = torch.randn(70, 130), Router(torch.randn(37, 130), torch.randn(37), 5, True)
    assert rows.numel() * 37 > 1 << 18  # fewer are not dealt out
    wanted = route(rows, router)
    try:
        assert set_pool_threads(2) == 2
        threaded = route(rows, router)
    finally:
        set_pool_threads(1)
    for found, each in zip(threaded, wanted, strict=True):
        assert torch.equal(found, each)
    for row in range(70):
        alone = route(rows[row : row + 1], router)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, wanted, strict=True))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("experts, k, bias", [(4, 4, True), (8, 2, False), (37, 5, True)])
def test_routers(experts: int, k: int, bias: bool, normalized: bool, instruction_set: str) -> None:
    torch.manual_seed(0)
    rows, matrix = torch.randn(6, 50), torch.randn(experts, 50)
    router = Router(matrix, torch.randn(experts) if bias else None, k, normalized)
    logits, shares, chosen = route(rows, router)
    assert close(logits, F.linear(rows, matrix, router.bias).double())
    wanted, best = logits.double().softmax(1).topk(k)
    assert torch.equal(chosen, best)
    assert close(shares, wanted / wanted.sum(1, keepdim=True) if normalized else wanted)
    for row in range(6):
        alone = route(rows[row : row + 1], router)
        both = zip(alone, (logits, shares, chosen), strict=True)
        assert all(torch.equal(one[0], many[row]) for one, many in both)
    rows[3, 49] = float("nan")
    logits, shares, chosen = route(rows, router)
    assert shares[3].isnan().all() and torch.isfinite(shares[[0, 1, 2, 4, 5]]).all()
    assert bool(((chosen >= 0) & (chosen < experts)).all())


def test_of_equal_logits_the_first_are_chosen(instruction_set: str) -> None:
    router = Router(torch.zeros(20, 16), None, 3, True)
    _, shares, chosen = route(torch.ones(2, 16), router)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert close(shares, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_is_the_sum_of_its_parts(shared: bool, instruction_set: str) -> None:
    torch.manual_seed(1)
    m, lengths, residual = module(4, 2, 16, 16, "heads"), (1, 15, 65), 0.7
    case = Case(m, lengths)
    norms = [Norm(torch.rand(WIDTH) + 0.5, 1e-6) for _ in range(2)]
    router = Router(torch.randn(8, WIDTH), None, 3, True)
    gate, down = torch.randn(64, WIDTH) / 7, torch.randn(WIDTH, 32) / 6
    first, last = (tile_matrix(encode(w, FLOAT32), FLOAT32, *w.shape) for w in (gate, down))
    expert = TileExpert.of(first, None, last, None)
    own = (expert, (SILU_MUL, 0.0, 0.0)) if shared else None
    parts = LayerParts(norms[0], m.weights, norms[1], router, own, residual)
    hidden = case.hidden
    case.hidden = normalize(hidden, norms[0])
    wanted = hidden + residual * case.wanted()
    case.run(STRAIGHT)  # leaves pages and rows
    step = LayerStep(parts, scratch := Scratch())
    room, buffers = StepRoom(3, parts), (case.buffers[0], case.buffers[1])
    addresses = (case.turns[0].data_ptr(), case.turns[1].data_ptr())
    for again in range(2):  # the second time in memory that has its size
        stream = step.head(hidden, addresses, buffers, case.places, room)
        assert close(stream, wanted), again
        normed = rms(stream, norms[1])
        assert close(room.normed, normed)
        _, shares, chosen = route(room.normed, router)
        assert torch.equal(room.shares, shares) and torch.equal(room.chosen, chosen)
        experts = torch.randn(3, WIDTH)
        both = experts.double()
        if shared:
            gates, ups = (room.normed.double() @ gate.double().T).chunk(2, 1)
            both = both + (F.silu(gates) * ups) @ down.double().T
        before, early, given = stream.clone(), stream.clone(), stream.clone()
        step.tail(stream, experts)
        assert close(stream, before + residual * both)
        step.run_shared()  # where something else was waited for
        step.tail(early, experts)
        assert torch.equal(early, stream)
        if shared:
            step.tail(given, experts, room.shared)
            assert torch.equal(given, stream)
        step.run_shared(torch.full_like(experts, 7))  # of a step that failed before its tail
    assert scratch.size_bytes > 0
    smaller = StepRoom(1, parts)  # another number of tokens, then the first again
    only = Rows(case.places.rows[:1], case.places.starts[:2])
    one_row = step.head(hidden[:1].contiguous(), addresses, buffers, only, smaller)
    all_rows = step.head(hidden, addresses, buffers, case.places, room)
    assert torch.equal(one_row[0], all_rows[0])
