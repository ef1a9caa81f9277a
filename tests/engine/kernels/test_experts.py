"""All experts of a layer in one call, and what becomes of their results, against plain torch."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from moestro.engine.kernels import (
    ExpertTable,
    Groups,
    Routed,
    Scratch,
    TileExpert,
    TileFormat,
    combine,
    encode,
    known_activation,
    multiply_experts,
    set_pool_threads,
    tile_matrix,
)
from moestro.engine.kernels.products import (
    CLAMPED_SIGMOID_MUL,
    GATED,
    GELU,
    GELU_MUL,
    GELU_TANH_MUL,
    RELU_SQUARED,
    SILU,
    SILU_MUL,
    activate,
)
from tile_reference import decode

WIDTH = 64
ALPHA, LIMIT = 1.702, 2.5
FLOATS = (TileFormat("float32"), TileFormat("bfloat16"), TileFormat("float16"))
MIXED = (TileFormat("int8"), TileFormat("int4", 32, "float16", "float"), *FLOATS)
Function = Callable[[torch.Tensor], torch.Tensor]


def clamped(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner[:, ::2].clamp(max=LIMIT), inner[:, 1::2].clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(gate * ALPHA)


def gated(function: Function) -> Function:
    return lambda inner: function(inner.chunk(2, 1)[0]) * inner.chunk(2, 1)[1]


ACTIVATIONS: dict[int, Function] = {
    SILU_MUL: gated(F.silu),
    GELU_MUL: gated(F.gelu),
    GELU_TANH_MUL: gated(lambda gate: F.gelu(gate, approximate="tanh")),
    CLAMPED_SIGMOID_MUL: clamped,
    SILU: F.silu,
    GELU: F.gelu,
    RELU_SQUARED: lambda inner: F.relu(inner) ** 2,
}


class Made:
    """An expert in tiles, and as torch computes it."""

    def __init__(self, form: TileFormat, inner: int, *, gated: bool, bias: bool) -> None:
        sizes = [(2 * inner if gated else inner, WIDTH), (WIDTH, inner)]
        stored = [encode(torch.randn(size) / size[1] ** 0.5, form) for size in sizes]
        self.form = form
        self.weights = [
            decode(each, form, *size).double() for each, size in zip(stored, sizes, strict=True)
        ]
        self.biases = [torch.randn(size[0]) if bias else None for size in sizes]
        first, down = (
            tile_matrix(each, form, *size) for each, size in zip(stored, sizes, strict=True)
        )
        self.tile = TileExpert.of(first, self.biases[0], down, self.biases[1])

    def through(self, rows: torch.Tensor, function: Function) -> torch.Tensor:
        """Activations unrounded: integer formats are near it, floats are it."""
        biases = [None if each is None else each.double() for each in self.biases]
        inner = F.linear(rows.double(), self.weights[0], biases[0])
        return F.linear(function(inner), self.weights[1], biases[1])


@lru_cache
def made(form: TileFormat, inner: int, *, gated: bool, bias: bool) -> Made:
    """The same for every instruction set: telling bytes' meaning takes long."""
    torch.manual_seed(inner)
    return Made(form, inner, gated=gated, bias=bias)


def dealt(counts: Sequence[int], tokens: int) -> Routed:
    """So many rows for each expert, places in reverse."""
    total = sum(counts)
    starts = [sum(counts[:e]) for e in range(len(counts) + 1)]
    return Routed(starts, [(3 * row) % tokens for row in range(total)], range(total)[::-1])


def run(
    experts: Sequence[Made], counts: Sequence[int], rows: torch.Tensor, kind: int | Function
) -> torch.Tensor:
    out = torch.full((sum(counts), WIDTH), float("nan"))
    own = (kind, ALPHA, LIMIT) if isinstance(kind, int) else kind
    tiles, routed = [each.tile for each in experts], dealt(counts, len(rows))
    multiply_experts(ExpertTable(tiles), routed, rows, out, own, Scratch())
    return out


def wanted(
    experts: Sequence[Made], counts: Sequence[int], rows: torch.Tensor, function: Function
) -> torch.Tensor:
    owners = [expert for expert, count in zip(experts, counts, strict=True) for _ in range(count)]
    taken = [rows[(3 * row) % len(rows)][None] for row in range(len(owners))]
    each = [who.through(row, function) for who, row in zip(owners, taken, strict=True)]
    return torch.cat(each[::-1])


def near(found: torch.Tensor, exact: torch.Tensor, most: float = 1e-5) -> bool:
    return bool((found - exact).abs().max() <= most * exact.abs().max())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_experts_of_other_widths_and_formats(kind: int, instruction_set: str) -> None:
    """Some with no row at all, first, last and between."""
    torch.manual_seed(0)
    function, rows = ACTIVATIONS[kind], torch.randn(5, WIDTH)
    inners, counts = (16, 48, 40, 96, 32, 16), (0, 3, 1, 0, 7, 0)
    for bias in (False, True):
        experts = [
            made(FLOATS[i % 3], inner, gated=kind in GATED, bias=bias)
            for i, inner in enumerate(inners)
        ]
        found = run(experts, counts, rows, kind)
        assert near(found, wanted(experts, counts, rows, function))
        nobody = run(experts, [0] * 6, rows, kind)
        assert nobody.shape == (0, WIDTH)


def test_integer_experts_beside_floats_change_no_bit(instruction_set: str) -> None:
    torch.manual_seed(0)
    rows, function = torch.randn(16, WIDTH), ACTIVATIONS[SILU_MUL]
    experts = [made(form, 32 + 16 * i, gated=True, bias=i > 2) for i, form in enumerate(MIXED)]
    counts = (2, 16, 1, 5, 3)
    together = run(experts, counts, rows, SILU_MUL)
    exact = wanted(experts, counts, rows, function)
    assert near(together, exact, 0.03)
    floats = slice(0, sum(counts[2:]))  # places are in reverse
    assert near(together[floats], exact[floats])
    try:
        assert set_pool_threads(2) == 2
        assert torch.equal(run(experts, counts, rows, SILU_MUL), together)
    finally:
        set_pool_threads(1)


@pytest.mark.parametrize("form", MIXED, ids=lambda form: form.tag)
def test_a_row_is_the_same_in_any_company(form: TileFormat, instruction_set: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(16, WIDTH)
    one, other = (made(form, inner, gated=True, bias=True) for inner in (48, 32))
    alone = torch.cat([run([one], (1,), row[None], SILU_MUL) for row in rows])
    for count in range(1, 17):
        few = rows[:count].contiguous()
        out = torch.empty((2 * count, WIDTH))
        places = [*range(count), *range(count, 2 * count)]
        routed = Routed((0, count, 2 * count), [*range(count)] * 2, places)
        known = (SILU_MUL, 0.0, 0.0)
        multiply_experts(ExpertTable([one.tile, other.tile]), routed, few, out, known, Scratch())
        assert torch.equal(out[:count], alone[:count]), count
    routed, out = Routed((0, 2, 3), [9, 4, 15], range(3)), torch.empty((3, WIDTH))
    multiply_experts(
        ExpertTable([one.tile, other.tile]), routed, rows, out, (SILU_MUL, 0.0, 0.0), Scratch()
    )
    assert torch.equal(out[:2], alone[[9, 4]]), "of rows that mostly no expert asks for"


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_than_a_cache_holds(threads: int, instruction_set: str) -> None:
    """The call goes some experts at a time then; each gives what it gives in a call of its own."""
    torch.manual_seed(0)
    rows, counts = torch.randn(300, WIDTH), (500, 0, 1500, 40, 900)
    experts = [made(MIXED[i % 2], 32 + 16 * i, gated=True, bias=i > 2) for i in range(5)]
    routed, total = dealt(counts, len(rows)), sum(counts)
    out, energies = torch.full((total, WIDTH), float("nan")), torch.full((total,), float("nan"))
    known, scratch, tiles = (SILU_MUL, 0.0, 0.0), Scratch(), [each.tile for each in experts]
    try:
        assert set_pool_threads(threads) == threads
        multiply_experts(ExpertTable(tiles), routed, rows, out, known, scratch, energies)
    finally:
        set_pool_threads(1)
    assert scratch.size_bytes < 4 * total * (2 * 96 + 96), "what lies between never does as a whole"
    start = 0
    for tile, count in zip(tiles, counts, strict=True):
        tokens = [(3 * row) % len(rows) for row in range(start, start + count)]
        alone, own = torch.empty((count, WIDTH)), torch.empty(count)
        multiply_experts(
            ExpertTable([tile]),
            Routed((0, count), tokens, range(count)),
            rows,
            alone,
            known,
            Scratch(),
            own,
        )
        places = slice(total - start - count, total - start)  # places are in reverse
        assert torch.equal(out[places].flip(0), alone)
        assert torch.equal(energies[places].flip(0), own)
        start += count


def test_an_activation_of_its_own_is_a_function(instruction_set: str) -> None:
    torch.manual_seed(0)
    rows, counts = torch.randn(4, WIDTH), (2, 0, 5)

    def odd(inner: torch.Tensor) -> torch.Tensor:
        return torch.sin(inner[:, :48]) * inner[:, 48:]

    assert known_activation(odd, 96, 0.0, 0.0) is None
    experts = [made(FLOATS[i], 48, gated=True, bias=True) for i in range(3)]
    found = run(experts, counts, rows, odd)
    assert near(found, wanted(experts, counts, rows, odd))
    same = run(experts, counts, rows, ACTIVATIONS[SILU_MUL])
    assert near(same, run(experts, counts, rows, SILU_MUL))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_known_by_what_they_give(kind: int, instruction_set: str) -> None:
    for inputs in (64, 70):
        found = known_activation(ACTIVATIONS[kind], inputs, ALPHA, LIMIT)
        assert found == (kind, ALPHA, LIMIT)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_keeps_what_is_no_number(kind: int, instruction_set: str) -> None:
    for place in (3, 37):  # a gate and, with a gate, an up
        inner = torch.randn(2, 64)
        inner[1, place] = float("nan")
        found = activate(inner, (kind, ALPHA, LIMIT))
        assert torch.isfinite(found[0]).all()
        assert int(found[1].isnan().sum()) == 1


@pytest.mark.parametrize("width", [16, 50, 64])
def test_results_are_summed_in_their_order(width: int, instruction_set: str) -> None:
    torch.manual_seed(0)
    weights, results = torch.rand(3, 4), torch.randn(12, width)
    found = combine(weights, results)
    exact = torch.einsum("tk,tkh->th", weights.double(), results.view(3, 4, width).double())
    assert near(found, exact)
    for t in range(3):
        alone = combine(weights[t : t + 1], results[4 * t : 4 * t + 4].contiguous())
        assert torch.equal(alone[0], found[t])
    # 1e8 + 1 - 1e8 in this order, and none that starts with the two large ones
    ordered = torch.tensor([[1e8], [1.0], [-1e8]]).expand(3, width).contiguous()
    assert torch.equal(combine(torch.ones(1, 3), ordered), torch.zeros(1, width))
    results[5, 0] = float("nan")
    found = combine(weights, results)
    assert found[1, 0].isnan() and torch.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("counts", [(1, 0, 2), (40, 3, 17)])
def test_energies_are_the_activations_squared_norms_and_change_no_result(
    counts: tuple[int, ...], instruction_set: str
) -> None:
    """In the places of the results; those of no row stay. By activations known and unknown."""
    torch.manual_seed(0)
    rows, function = torch.randn(20, WIDTH), ACTIVATIONS[SILU_MUL]
    experts = [made(form, 48, gated=True, bias=True) for form in FLOATS]
    tiles, routed = [each.tile for each in experts], dealt(counts, len(rows))
    total, found = sum(counts), []
    for own in ((SILU_MUL, ALPHA, LIMIT), function):
        energies, out = torch.full((total + 1,), 7.0), torch.empty((total, WIDTH))
        multiply_experts(ExpertTable(tiles), routed, rows, out, own, Scratch(), energies)
        assert energies[total] == 7
        plain = run(experts, counts, rows, SILU_MUL if isinstance(own, tuple) else own)
        assert torch.equal(out, plain)
        found.append(energies[:total])
    owners = [expert for expert, count in zip(experts, counts, strict=True) for _ in range(count)]
    exact = torch.empty(total, dtype=torch.double)
    for row, who in enumerate(owners):
        bias = who.biases[0]
        assert bias is not None
        taken = rows[(3 * row) % len(rows)][None].double()
        exact[routed.places[row]] = (
            function(F.linear(taken, who.weights[0], bias.double())).square().sum()
        )
    for energies in found:
        assert torch.allclose(energies.double(), exact, rtol=1e-4)


@pytest.mark.parametrize(
    "tokens,k,experts", [(1, 1, 1), (1, 4, 8), (8, 12, 24), (3, 2, 40), (0, 2, 4)]
)
def test_groups_are_the_places_of_each_expert(tokens: int, k: int, experts: int) -> None:
    """Beside a dictionary; also with ids that are none, weights of 0 and experts chosen twice."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 2, (tokens, k), generator=generator)
    weights = torch.rand((tokens, k), generator=generator)
    weights[torch.rand((tokens, k), generator=generator) < 0.2] = 0
    weights.view(-1)[1::7] = float("nan")  # is not 0
    wanted: dict[int, list[int]] = {}
    for place, (expert, weight) in enumerate(
        zip(ids.flatten().tolist(), weights.flatten().tolist(), strict=True)
    ):
        if weight != 0 and 0 <= expert < experts:
            wanted.setdefault(expert, []).append(place)
    groups = Groups(tokens, k, experts)
    groups.take(ids.clone().fill_(0), weights)
    assert set(groups.by_expert()) <= {0}
    groups.take(ids, weights)
    assert list(groups.by_expert().items()) == list(wanted.items())
    assert groups.experts == list(wanted)
    assert groups.places == [place for places in wanted.values() for place in places]
    assert (groups.count, groups.rows) == (len(wanted), len(groups.places))


def test_groups_choose_among_the_experts_of_a_layer(instruction_set: str) -> None:
    """As the same experts do in a call of their own; places of nobody stay as they were."""
    torch.manual_seed(0)
    rows, known = torch.randn(5, WIDTH), (SILU_MUL, 0.0, 0.0)
    layer = [made(MIXED[i % 2], 32 + 16 * (i % 3), gated=True, bias=i > 2) for i in range(6)]
    ids = torch.tensor([[4, 1], [1, 9], [5, 4], [1, 1], [4, 3]])
    weights = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    groups = Groups(5, 2, 6)
    groups.take(ids, weights)
    assert groups.experts == [4, 1, 3]
    out, found = torch.full((10, WIDTH), 7.0), torch.full((10,), 7.0)
    table = ExpertTable([each.tile for each in layer])
    multiply_experts(table, groups, rows, out, known, Scratch(), found)
    same, energies = torch.full((10, WIDTH), 7.0), torch.full((10,), 7.0)
    places = groups.places
    routed = Routed((0, 3, 7, 8), [place // 2 for place in places], places)
    own = ExpertTable([layer[expert].tile for expert in groups.experts])
    multiply_experts(own, routed, rows, same, known, Scratch(), energies)
    assert torch.equal(out, same) and torch.equal(found, energies)
    assert [place for place in range(10) if bool((out[place] == 7).all())] == [3, 4]
