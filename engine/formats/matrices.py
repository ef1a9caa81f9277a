"""How an expert's matrices become bytes, and how they are multiplied with.

Here they lie in rows, for torch's products: on a GPU, and where there is no library of our own
(tiled.py). `native` keeps the checkpoint's dtype and computes in the compute dtype. `int8` keeps
one byte per weight, with one scale per output row, and quantizes every activation row by its own
maximum (W8A8): the product is taken in integers, so company in the batch cannot change a row by a
bit. `int4` and `nf4` are next door; named.py has all names.

Shape letters: E experts, N outputs, K inputs, n rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from moestro.engine.facts import ModelRefused
from moestro.engine.kernels import int_mm_is_exact

SCALE = "scale"  # a quantized matrix `x` has its scales beside it as `x.scale`
LARGEST = 127.0
SECOND_DIGIT = 254.0  # steps of the second digit in one of the first: half a step is 127
LEAST_ROWS = 32
"""Of an int8 product on a GPU, whose kernel refuses 16; whole eights are safe. Fewer are filled up:

few rows take as long as reading the weights does, and expanding these would read four times."""
FLOAT_INPUTS = 1024  # products of so many pairs of bytes add up in fp32 without rounding
TINIEST = 1e-30  # scale of a row of zeros: anything but 0

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape of one expert)
Span = tuple[int, int]  # rows [start, end)
Source = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> (dtype, [E, ...])


class Codec(Protocol):
    """`begin` prepares rows once for all experts of a layer; the products pick theirs."""

    name: str
    tiled: bool
    """Its matrices are tiles: one call for a whole layer takes them (mixed.py, `as_tile`)."""

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        """What one expert of a module with `tensors` consists of in the pack."""

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        """{name: [E, ...]} of a checkpoint -> {name: [E, ...]} of the pack, as in `layout`."""

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> Any:
        """The matrix `name` of one expert as the products want it: views only, valid as these."""

    def begin(self, rows: torch.Tensor) -> Any:
        """[n, K] in the compute dtype -> what the products want."""

    def take(self, rows: Any, places: torch.Tensor) -> Any:
        """Rows `places` of what `begin` gave."""

    def multiply(self, rows: Any, matrix: Any) -> torch.Tensor:
        """Rows [n, K] times one matrix -> [n, N] in the compute dtype."""

    def multiply_each(
        self, rows: Any, spans: Sequence[Span], matrices: Sequence[Any]
    ) -> torch.Tensor:
        """Rows [start, end) of each span times its own matrix, one below the other -> [n, N].

        The spans are the whole of `rows`, in order. For few rows. What a row becomes does not
        depend on the other spans by a bit.
        """

    def multiply_apart(self, rows: Any, matrices: Sequence[Any]) -> torch.Tensor:
        """Row i, or the only row, times matrix i -> [n, N]: decoding alone.

        What a row becomes does not depend on the others by a bit.
        """


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NativeMatrix(NamedTuple):
    """One matrix, seen from both sides."""

    by_input: torch.Tensor  # [K, N]
    by_output: torch.Tensor  # [N, K]


class NativeCodec:
    """The checkpoint's bytes, widened to the compute dtype when they are used.

    On a GPU a matrix of numbers that are not smaller is kept in the compute dtype: the same, once.
    A widened matrix lies in one reused buffer, valid until the next one is asked for.
    """

    name = "native"
    tiled = False

    def __init__(self, compute_dtype: torch.dtype, device: str = "cpu") -> None:
        self._dtype, self._device = compute_dtype, device
        self._buffer = torch.empty(0, dtype=compute_dtype)

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        return {
            name: (dtype_name(self._kept(dtype, shape)), tuple(shape[1:]))
            for name, (dtype, shape) in tensors.items()
        }

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to(self._kept(tensor.dtype, tensor.shape))
            for name, tensor in tensors.items()
        }

    def _kept(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.dtype:
        """Of a tensor [E, ...]."""
        is_own = self._device == "cpu" or len(shape) != 3 or dtype.itemsize < self._dtype.itemsize
        return dtype if is_own else self._dtype

    def open(
        self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool
    ) -> NativeMatrix:
        stored = tensors[name]
        return NativeMatrix(*((stored, stored.t()) if transposed else (stored.t(), stored)))

    def begin(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def take(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, places)

    def multiply(self, rows: torch.Tensor, matrix: NativeMatrix) -> torch.Tensor:
        return rows @ self._widen(matrix.by_input)

    def multiply_each(
        self, rows: torch.Tensor, spans: Sequence[Span], matrices: Sequence[NativeMatrix]
    ) -> torch.Tensor:
        out = rows.new_empty((len(rows), matrices[0].by_input.shape[1]))
        for (start, end), matrix in zip(spans, matrices, strict=True):
            torch.mm(rows[start:end], self._widen(matrix.by_input), out=out[start:end])
        return out

    def multiply_apart(self, rows: torch.Tensor, matrices: Sequence[NativeMatrix]) -> torch.Tensor:
        out = rows.new_empty((len(matrices), matrices[0].by_input.shape[1]))
        vectors = rows.unbind() if len(rows) > 1 else (rows[0],) * len(matrices)
        for vector, matrix, into in zip(vectors, matrices, out.unbind(), strict=True):
            torch.mv(self._widen(matrix.by_output), vector, out=into)
        return out

    def _widen(self, matrix: torch.Tensor) -> torch.Tensor:
        if matrix.dtype == self._dtype:
            return matrix
        count = matrix.numel()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self._dtype, device=matrix.device)
        return self._buffer.as_strided(matrix.shape, matrix.stride()).copy_(matrix)


def biases_layout(tensors: Source) -> Layout:
    """What is no matrix is kept as fp32 by every quantized format."""
    return {
        name: ("float32", tuple(shape[1:]))
        for name, (_, shape) in tensors.items()
        if len(shape) != 3
    }


def biases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, [E, ...] in fp32."""
    return {name: tensor.float() for name, tensor in tensors.items() if tensor.dim() != 3}


def matrix_sides(tensors: Source, transposed: bool) -> Iterator[tuple[str, int, int]]:
    """Name, outputs N and inputs K of each matrix of an expert."""
    for name, (_, shape) in tensors.items():
        if len(shape) == 3:
            yield (name, shape[2], shape[1]) if transposed else (name, shape[1], shape[2])


def matrices_of(
    tensors: Mapping[str, torch.Tensor], transposed: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and [E, N, K] of each matrix."""
    for name, tensor in tensors.items():
        if tensor.dim() == 3:
            yield name, tensor.transpose(1, 2) if transposed else tensor


def to_encode(weight: torch.Tensor, device: str) -> torch.Tensor:
    """One matrix of one expert in fp32, contiguous, on the kind of device that encodes it.

    A GPU does it many times faster; of one matrix at a time it always has the memory.
    """
    there = weight if device == "cpu" else weight.contiguous().to(device)
    return there.float().contiguous()


Quantized = tuple[torch.Tensor, torch.Tensor]  # rows: int8 [n, K], fp32 [n, 1]
Int8Matrix = tuple[torch.Tensor, torch.Tensor]  # int8 [K, N], fp32 [N]


class Int8Codec:
    """Matrices as int8 [N, K] with fp32 scales [N]; everything else (biases) as fp32."""

    name = "int8"
    tiled = False

    def __init__(self, compute_dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """`device`: the kind that computes, which also encodes."""
        self._dtype, self._device = compute_dtype, device

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        found = biases_layout(tensors)
        for name, outputs, inputs in matrix_sides(tensors, transposed):
            if self._device != "cpu" and (outputs % 8 or inputs % 8):
                raise ModelRefused(
                    f"--expert-format int8: {name} is {outputs} x {inputs}, and a GPU multiplies"
                    " multiples of 8 alone; use native"
                )
            found[name] = ("int8", (outputs, inputs))
            found[f"{name}.{SCALE}"] = ("float32", (outputs,))
        return found

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        found = biases(tensors)
        for name, matrix in matrices_of(tensors, transposed):
            found[name] = torch.empty(matrix.shape, dtype=torch.int8)
            scales = torch.empty(matrix.shape[:2], dtype=torch.float32)
            for expert, weight in enumerate(matrix):  # one at a time: fp32 of a layer is large
                values, scale = quantize_rows(to_encode(weight, self._device))
                found[name][expert] = values
                scales[expert] = scale[:, 0]
            found[f"{name}.{SCALE}"] = scales
        return found

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> Int8Matrix:
        return tensors[name].t(), tensors[f"{name}.{SCALE}"]

    def begin(self, rows: torch.Tensor) -> Quantized:
        return quantize_rows(rows.float())

    def take(self, rows: Quantized, places: torch.Tensor) -> Quantized:
        return rows[0].index_select(0, places), rows[1].index_select(0, places)

    def multiply(self, rows: Quantized, matrix: Int8Matrix) -> torch.Tensor:
        return multiply_int8(rows, matrix).to(self._dtype)

    def multiply_each(
        self, rows: Quantized, spans: Sequence[Span], matrices: Sequence[Int8Matrix]
    ) -> torch.Tensor:
        values, row_scales = rows
        scales = per_row([scale for _, scale in matrices], [end - start for start, end in spans])
        if values.device.type != "cpu":
            each = zip(spans, matrices, strict=True)
            products = torch.cat(
                [filled_int_mm(values[a:b], weight) for (a, b), (weight, _) in each]
            )
            return products.float().mul_(scales).mul_(row_scales).to(self._dtype)
        products = values.new_empty((len(values), matrices[0][0].shape[1]), dtype=torch.int32)
        for (start, end), (weight, _) in zip(spans, matrices, strict=True):
            cpu_int_mm(values[start:end], weight, products[start:end])
        return products.float().mul_(scales).mul_(row_scales).to(self._dtype)

    def multiply_apart(self, rows: Quantized, matrices: Sequence[Int8Matrix]) -> torch.Tensor:
        values, row_scales = rows
        scales = per_row([scale for _, scale in matrices], None)
        if values.device.type != "cpu":
            products = filled_int_mm_apart(values, [weight for weight, _ in matrices])
            return products.float().mul_(scales).mul_(row_scales).to(self._dtype)
        shape = (len(matrices), matrices[0][0].shape[1])
        products, only = values.new_empty(shape, dtype=torch.int32), len(values) == 1
        for place, (weight, _) in enumerate(matrices):
            row = values if only else values[place : place + 1]
            cpu_int_mm(row, weight, products[place : place + 1])
        return products.float().mul_(scales).mul_(row_scales).to(self._dtype)


def per_row(each: Sequence[torch.Tensor], counts: Sequence[int] | None) -> torch.Tensor:
    """Tensors [N], each as often as its count says (None: once), one below the other -> [n, N]."""
    if counts is None or max(counts) == 1:
        return torch.stack(tuple(each))
    return torch.cat([one.expand(count, -1) for one, count in zip(each, counts, strict=True)])


def largest_of_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, K] -> [n, 1]. The infinity norm would say the same and takes fifteen times as long."""
    return rows.abs().amax(dim=1, keepdim=True)


def quantize_rows(rows: torch.Tensor) -> Quantized:
    """fp32 [n, K] -> int8 [n, K] and fp32 [n, 1]: symmetric, each row by its own maximum."""
    scale = largest_of_rows(rows).mul_(1 / LARGEST).clamp_min_(TINIEST)
    return torch.div(rows, scale).round_().char(), scale


def multiply_int8(rows: Quantized, matrix: Int8Matrix) -> torch.Tensor:
    """Rows times a matrix, both with their scales -> fp32 [n, N]; the sum is exact."""
    (values, row_scale), (weight, scale) = rows, matrix
    return int_mm(values, weight).float().mul_(scale).mul_(row_scale)


def int_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [n, K] x [K, N] -> int32 [n, N]"""
    if rows.device.type != "cpu":
        return filled_int_mm(rows, weight)
    products = rows.new_empty((len(rows), weight.shape[1]), dtype=torch.int32)
    cpu_int_mm(rows, weight, products)
    return products


def cpu_int_mm(rows: torch.Tensor, weight: torch.Tensor, products: torch.Tensor) -> None:
    """The same into int32 `products` [n, N]: exact on every processor."""
    if int_mm_is_exact():
        torch._int_mm(rows, weight, out=products)
        return
    products.zero_()
    for k in range(0, rows.shape[1], FLOAT_INPUTS):
        some, part = rows[:, k : k + FLOAT_INPUTS].float(), weight[k : k + FLOAT_INPUTS].float()
        products += torch.mm(some, part).int()


def filled_int_mm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same on a GPU. K and N are multiples of 8."""
    count = len(rows)
    whole = max(LEAST_ROWS, -(-count // 8) * 8)
    filled = rows if whole == count else F.pad(rows, (0, 0, 0, whole - count))
    return torch._int_mm(filled, weight)[:count]


def filled_int_mm_apart(rows: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """A row for each matrix, or one for all, on a GPU: filled up in one go -> int32 [m, N]."""
    count = len(weights)
    filled = rows.new_zeros((count, LEAST_ROWS, rows.shape[1]))
    filled[:, 0] = rows
    products = rows.new_empty((count, LEAST_ROWS, weights[0].shape[1]), dtype=torch.int32)
    for some, weight, out in zip(filled, weights, products, strict=True):
        torch._int_mm(some, weight, out=out)
    return products[:, 0]


Fine = tuple[torch.Tensor, torch.Tensor]  # two digits: int8 [2n, K], fp32 [n, 1]


def quantize_fine(rows: torch.Tensor) -> Fine:
    """fp32 [n, K] -> two int8 digits: n rows of the first, then n of the second.

    One digit per number is too coarse for rows with a few very large numbers. The second holds
    what the first rounds away, in steps of 1/254 of the first's: 15 bits.
    """
    count = rows.shape[0]
    row_scale = largest_of_rows(rows).mul_(1 / LARGEST).clamp_min_(TINIEST)
    exact = torch.div(rows, row_scale)
    digits = torch.empty((2 * count, rows.shape[1]), dtype=torch.int8, device=rows.device)
    first = exact.round()
    digits[:count] = first
    digits[count:] = exact.sub_(first).mul_(SECOND_DIGIT).round_()
    return digits, row_scale


def multiply_fine(rows: Fine, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows of two digits x int8 [K, N] with scales [N] -> fp32 [n, N]: one product of 2n rows."""
    digits, row_scale = rows
    count = row_scale.shape[0]
    products = int_mm(digits, weight)
    whole = products[count:].to(torch.float32).mul_(1 / SECOND_DIGIT).add_(products[:count])
    return whole.mul_(scale).mul_(row_scale)
