"""Products with matrices in tiles, on tensors: rows, columns and pointers for the library.

Shape letters: n rows, N outputs, K inputs, T tokens, k experts per token.
"""

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from .layout import KINDS, SCALES, ZEROS, TileFormat
from .library import ExpertCall, ExpertStruct, GroupCall, MatrixStruct, library

Activation = tuple[int, float, float]  # which of the library's, alpha, limit

SILU_MUL, GELU_MUL, GELU_TANH_MUL, CLAMPED_SIGMOID_MUL, SILU, GELU, RELU_SQUARED = range(7)
GATED = range(SILU_MUL, CLAMPED_SIGMOID_MUL + 1)


class TileMatrix(NamedTuple):
    """A matrix where it lies; valid as `stored` is."""

    struct: MatrixStruct
    address: int
    stored: torch.Tensor  # uint8 [tiles, tile_bytes]
    order: torch.Tensor | None  # int32 [K]

    @property
    def outputs(self) -> int:
        return int(self.struct.outputs)

    @property
    def inputs(self) -> int:
        return int(self.struct.inputs)


def tile_matrix(
    stored: torch.Tensor,
    form: TileFormat,
    outputs: int,
    inputs: int,
    row_group: int = 0,
    order: torch.Tensor | None = None,
) -> TileMatrix:
    """`stored` as `form` says. Rows of int8 share a scale by `row_group` inputs (0: all of a row);

    with int4 and mxfp4 by the weights' own groups.
    """
    padded = form.padded(inputs)
    if form.is_float:
        row_group = 0
    elif form.kind == "int8":
        row_group = row_group if row_group and padded % row_group == 0 else padded
    else:
        row_group = form.group_of(inputs)
    struct = MatrixStruct(
        stored.data_ptr(),
        form.tile_bytes(inputs),
        outputs,
        inputs,
        padded,
        KINDS.index(form.kind),
        form.group_of(inputs),
        SCALES.index(form.scale),
        ZEROS.index(form.zero),
        row_group,
        None if order is None else order.data_ptr(),
    )
    return TileMatrix(struct, ctypes.addressof(struct), stored, order)


class TileExpert(NamedTuple):
    """An expert's two matrices, biases beside them; valid as what they point to is."""

    struct: ExpertStruct
    address: int
    first: TileMatrix
    down: TileMatrix
    biases: tuple[torch.Tensor | None, torch.Tensor | None]  # fp32 [N]

    @classmethod
    def of(
        cls,
        first: TileMatrix,
        first_bias: torch.Tensor | None,
        down: TileMatrix,
        down_bias: torch.Tensor | None,
    ) -> "TileExpert":
        pointers = (None if b is None else b.data_ptr() for b in (first_bias, down_bias))
        struct = ExpertStruct(first.struct, down.struct, *pointers)
        return cls(struct, ctypes.addressof(struct), first, down, (first_bias, down_bias))


class Scratch:
    """Memory between the steps of a call: as much as the largest call so far needed."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._rows: torch.Tensor | None = None  # the last ones given

    @property
    def size_bytes(self) -> int:
        return self._memory.numel()

    @property
    def address(self) -> int:
        return self._memory.data_ptr()

    def grow(self, size_bytes: int) -> None:
        self._memory, self._rows = torch.empty(size_bytes, dtype=torch.uint8), None

    def rows(self, count: int, width: int) -> torch.Tensor:
        """fp32 [count, width] with anything in it, until this is asked for the next time.

        What a layer of a prompt writes into is too large for the allocator to keep: fresh memory
        for each costs a page fault every 4 KiB.
        """
        if self._rows is None or self._rows.shape != (count, width):
            needed = 4 * count * width
            if needed > self.size_bytes:
                self.grow(needed)
            self._rows = self._memory[:needed].view(torch.float32).view(count, width)
        return self._rows


def loaded() -> ctypes.CDLL:
    found = library()
    assert found is not None, "tiles are made only where the library is"
    return found


def linear(
    rows: torch.Tensor, matrix: TileMatrix, bias: torch.Tensor | None, scratch: Scratch
) -> torch.Tensor:
    """fp32 [n, K], contiguous, times a matrix -> fp32 [n, N]; bias fp32 [N]."""
    count, inputs = rows.shape
    out = torch.empty((count, matrix.struct.outputs))
    call = loaded().moestro_linear
    arguments = (
        matrix.address,
        rows.data_ptr(),
        inputs,
        count,
        out.data_ptr(),
        None if bias is None else bias.data_ptr(),
    )
    while needed := call(*arguments, scratch.address, scratch.size_bytes):
        scratch.grow(needed)
    return out


class Routed:
    """Whose rows go where: the rows starts[e] to starts[e + 1] are of expert e of the call."""

    def __init__(self, starts: Sequence[int], tokens: Sequence[int], places: Sequence[int]) -> None:
        """[experts + 1]; [rows]: row of hidden; [rows]: row of results."""
        self.places = places
        self.count, self.which = len(starts) - 1, 0
        self._arrays = array("i", starts), array("i", tokens), array("i", places)
        self.addresses = tuple(each.buffer_info()[0] for each in self._arrays)

    @classmethod
    @lru_cache(maxsize=256)
    def of_one_token(cls, experts: int) -> "Routed":
        """Expert i of the call gets the only row, and gives row i."""
        return cls(range(experts + 1), [0] * experts, range(experts))


class Groups:
    """Who was chosen, as the places t * k + j of each expert: a `Routed` for a whole layer's table.

    Ids that are none of a layer's `experts`, and places of weight 0, are in no group, so that no
    expert is loaded for nothing. Experts come in the order of their first place.
    """

    def __init__(self, tokens: int, k: int, experts: int) -> None:
        self.shape = (tokens, k, experts)
        self._most, places = min(experts, tokens * k), tokens * k
        lengths = (self._most, self._most + 1, places, places, experts)
        self._numbers = (ctypes.c_int32 * sum(lengths))()
        start = ctypes.addressof(self._numbers)
        *addresses, _ = accumulate((4 * each for each in lengths), initial=start)
        self._call = GroupCall(None, None, *addresses, tokens, k, experts)
        self.which, *self.addresses = addresses[:4]
        self._starts, self._places = self._most, 2 * self._most + 1 + places
        self.count, self.experts = 0, list[int]()
        self._by_expert: dict[int, list[int]] | None = None

    def take(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """`ids` int64 and `weights` fp32 [T, k], contiguous. What was taken before is gone."""
        self._call.ids, self._call.weights = ids.data_ptr(), weights.data_ptr()
        self.count = loaded().moestro_group(self._call)
        self.experts, self._by_expert = self._numbers[: self.count], None

    @property
    def rows(self) -> int:
        """How many places are in a group."""
        return self._numbers[self._starts + self.count]

    @property
    def places(self) -> list[int]:
        """Of all groups, one after the other."""
        return self._numbers[self._places : self._places + self.rows]

    def by_expert(self) -> dict[int, list[int]]:
        """The places of each expert."""
        if self._by_expert is None:
            starts = self._numbers[self._starts : self._starts + self.count + 1]
            spans, places = zip(self.experts, pairwise(starts), strict=True), self.places
            self._by_expert = {expert: places[start:end] for expert, (start, end) in spans}
        return self._by_expert


class ExpertTable:
    """Experts that a call chooses among; valid as they are."""

    def __init__(self, experts: Sequence[TileExpert]) -> None:
        self.experts = experts
        self._pointers = (ctypes.c_void_p * len(experts))(*[each.address for each in experts])
        self.address = ctypes.addressof(self._pointers)


class OpenTable:
    """Like `ExpertTable`, of a layer of which other experts are there each time."""

    def __init__(self, count: int) -> None:
        self.experts: Sequence[TileExpert] = ()
        self._pointers = (ctypes.c_void_p * count)()
        self.address = ctypes.addressof(self._pointers)

    def put(self, numbers: Iterable[int], experts: Sequence[TileExpert]) -> None:
        """A call with it chooses among these `numbers` alone."""
        self.experts, pointers = experts, self._pointers
        for number, expert in zip(numbers, experts, strict=True):
            pointers[number] = expert.address


def multiply_experts(
    table: ExpertTable | OpenTable,
    routed: Routed | Groups,
    hidden: torch.Tensor,
    results: torch.Tensor,
    activation: Activation | Callable[[torch.Tensor], torch.Tensor],
    scratch: Scratch,
    energies: torch.Tensor | None = None,
) -> None:
    """Rows of fp32 `hidden` [T, H] through their experts, into rows of fp32 `results` [T * k, H].

    `table` has the experts of the call, or of `Groups` all of the layer. An activation that the
    library does not know is a function [n, N] -> [n, width] of the rows of all experts, whose
    widths are then the same. `energies` fp32 [T * k], where wanted, gets the squared norm of each
    row's activations in the place of its result.
    """
    if isinstance(activation, tuple):
        call = expert_call(table, routed, hidden, results, scratch, activation)
        call.energies = None if energies is None else energies.data_ptr()
        _run("moestro_experts", call, scratch)
        return
    places = routed.places
    inner = torch.empty((len(places), table.experts[0].first.outputs))
    _run(
        "moestro_experts_first",
        expert_call(table, routed, hidden, results, scratch, inner=inner),
        scratch,
    )
    inner = activation(inner).contiguous()
    if energies is not None:
        energies[torch.tensor(places)] = energies_of(inner)
    _run(
        "moestro_experts_down",
        expert_call(table, routed, hidden, results, scratch, inner=inner),
        scratch,
    )


def _run(name: str, call: ExpertCall, scratch: Scratch) -> None:
    run = getattr(loaded(), name)
    while needed := run(call):
        scratch.grow(needed)
        call.scratch, call.scratch_bytes = scratch.address, scratch.size_bytes


def expert_call(
    table: ExpertTable | OpenTable,
    routed: Routed | Groups,
    hidden: torch.Tensor,
    results: torch.Tensor,
    scratch: Scratch,
    activation: Activation = (SILU_MUL, 0.0, 0.0),
    inner: torch.Tensor | None = None,
) -> ExpertCall:
    """Valid as all of these are."""
    kind, alpha, limit = activation
    return ExpertCall(
        table.address,
        routed.which,
        *routed.addresses,
        hidden.data_ptr(),
        results.data_ptr(),
        None if inner is None else inner.data_ptr(),
        0 if inner is None else inner.shape[1],
        routed.count,
        hidden.shape[0],
        hidden.shape[1],
        results.shape[1],
        kind,
        alpha,
        limit,
        scratch.address,
        scratch.size_bytes,
    )


def energies_of(inner: torch.Tensor) -> torch.Tensor:
    """Activations [n, width] -> fp32 [n], the squared norm of each row."""
    return inner.float().square().sum(dim=1)


def combine(weights: torch.Tensor, results: torch.Tensor) -> torch.Tensor:
    """fp32 [T, k] and [T * k, H], contiguous -> [T, H]: the weighted sum over k, in its order."""
    tokens, k = weights.shape
    out = torch.empty((tokens, results.shape[1]))
    loaded().moestro_combine(
        weights.data_ptr(), results.data_ptr(), tokens, k, results.shape[1], out.data_ptr()
    )
    return out


def activate(inner: torch.Tensor, activation: Activation) -> torch.Tensor:
    """fp32 [n, 2 W], or of an activation without gate [n, W] -> [n, W]."""
    kind, alpha, limit = activation
    width = inner.shape[1] // 2 if kind in GATED else inner.shape[1]
    out = torch.empty((len(inner), width))
    loaded().moestro_activate(
        kind, inner.data_ptr(), out.data_ptr(), len(inner), width, alpha, limit
    )
    return out


def known_activation(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: int, alpha: float, limit: float
) -> Activation | None:
    """The library's activation that gives what `function` [n, inputs] -> [n, width] gives.

    `alpha` and `limit` are those of its module, where it has such. None: it knows none like it.
    """
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn((4, inputs), generator=generator)
    inner *= torch.tensor([[0.1], [1.0], [4.0], [20.0]])
    wanted = function(inner.clone())
    for kind in range(RELU_SQUARED + 1):
        if wanted.shape[1] == (inputs // 2 if kind in GATED else inputs):
            found = (kind, alpha, limit)
            # A row's largest: where 1 + erf(gate) is nearly 0, its last digit is times `up`.
            scale = inner.abs().amax(dim=1, keepdim=True).clamp(min=1)
            apart = (activate(inner, found) - wanted).abs()
            if bool((apart <= 1e-5 * wanted.abs() + 1e-6 * scale).all()):
                return found
    return None
