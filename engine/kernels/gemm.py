"""int8 products of many rows by torch's `_int_mm` instead of the library's own, where it is faster.

Which is faster depends on the processor. Weights have to be taken out of their tiles for it, which
many rows pay for. Both give the same integers, and these are scaled by the same operations, so that
results are the same to the bit.
"""

import ctypes
import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch

from .layout import UNIT, TileFormat
from .library import GEMM
from .products import Scratch, linear, loaded, tile_matrix

log = logging.getLogger("moestro.engine")

NEVER = 0  # rows
MOST_ROWS, LEAST_ROWS = 1024, 16  # that are tried: the most, then halves while theirs is faster
GAIN = 1.1  # that is worth it
REPEATS = 5
OUTPUTS, INPUTS, MATRICES = 1024, 2048, 4  # that are multiplied with in turn
LARGEST = 127
HOPELESS = 4  # times as slow as the other: once is enough to know


@dataclass(frozen=True, slots=True)
class GemmChoice:
    """From how many rows on torch's product serves, and why: multiply-adds per second.

    Both rates are 0 where torch's is not exact on this processor.
    """

    least_rows: int  # NEVER: the library's own serve always
    measured_rows: int  # with the least of them, or else the most that were tried
    own_rate: float
    gemm_rate: float


def use_gemm(least_rows: int) -> None:
    """Multiply int8 matrices by torch from so many rows on (NEVER: none), from now on.

    The library has to be here, and no product under way.
    """
    loaded().moestro_use_gemm(_callback() if least_rows else GEMM(), least_rows)


@lru_cache(maxsize=1)
def _callback() -> object:  # the library keeps its address, so it stays
    return GEMM(_multiply)


def _multiply(rows: int, weights: int, sums: int, count: int, outputs: int, inputs: int) -> int:
    try:
        torch._int_mm(
            _view(rows, count, inputs, torch.int8),
            _view(weights, outputs, inputs, torch.int8).t(),
            out=_view(sums, count, outputs, torch.int32),
        )
    except RuntimeError as error:
        _say_refused(str(error))
        return 0
    return 1


@lru_cache
def _say_refused(why: str) -> None:  # once, not with each product
    log.warning("torch multiplies no int8 here (%s): the library does", why)


def _view(address: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, width] where it lies."""
    memory = (ctypes.c_char * (rows * width * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, width)


@lru_cache(maxsize=1)
def int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` adds up in 32 bits on this processor.

    Where there is no instruction for four products at once, two are added in 16 bits, and large
    ones saturate.
    """
    rows = torch.full((LEAST_ROWS, INPUTS), LARGEST, dtype=torch.int8)
    weights = torch.full((INPUTS, LEAST_ROWS), LARGEST, dtype=torch.int8)
    wanted = LARGEST * LARGEST * INPUTS
    return all(
        bool((torch._int_mm(rows * row_sign, weights * sign) == wanted * row_sign * sign).all())
        for row_sign in (1, -1)
        for sign in (1, -1)
    )


def measure_gemm() -> GemmChoice:
    """Takes a tenth of a second, or a few where the library's own are slow.

    The library's own serve afterwards. Torch's and the library's threads are those of now.
    """
    if not int_mm_is_exact():
        return GemmChoice(NEVER, 0, 0.0, 0.0)
    form = TileFormat("int8")
    tiles = torch.full((MATRICES, *form.shape(OUTPUTS, INPUTS)), UNIT, dtype=torch.uint8)
    chosen, count = None, MOST_ROWS
    while count >= LEAST_ROWS:
        tried = _tried(tiles, form, count)
        if tried.gemm_rate < GAIN * tried.own_rate:
            return chosen or GemmChoice(NEVER, count, tried.own_rate, tried.gemm_rate)
        chosen, count = tried, count // 2
    assert chosen is not None
    return chosen


def _tried(tiles: torch.Tensor, form: TileFormat, count: int) -> GemmChoice:
    matrices = [tile_matrix(each, form, OUTPUTS, INPUTS) for each in tiles]
    rows, scratch = torch.randn(count, INPUTS), Scratch()
    taken: dict[int, list[float]] = {NEVER: [], count: []}
    try:
        for turn in range(REPEATS + 1):  # the first is not counted
            for least in taken:
                use_gemm(least)
                since_s = time.perf_counter()
                linear(rows, matrices[turn % MATRICES], None, scratch)
                taken[least].append(time.perf_counter() - since_s)
            if taken[NEVER][-1] > HOPELESS * taken[count][-1]:
                break
    finally:
        use_gemm(NEVER)
    own_s, gemm_s = (median(some[1:] or some) for some in taken.values())
    numbers = count * OUTPUTS * INPUTS
    return GemmChoice(count, count, numbers / own_s, numbers / gemm_s)
