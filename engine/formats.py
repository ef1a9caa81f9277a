"""How an expert's matrices become bytes, and how they are multiplied with.

`native` keeps the checkpoint's dtype and computes in fp32. `int8` keeps one byte per weight, with
one scale per output row, and quantizes every activation row by its own maximum (W8A8): the product
is taken in integers, so company in the batch cannot change a row by a bit.

Shape letters: E experts, N outputs, K inputs, n rows.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F

SCALE = "scale"  # a quantized matrix `x` has its scales beside it as `x.scale`
LARGEST = 127.0
SECOND_DIGIT = 254.0  # steps of the second digit in one of the first: half a step is 127
TINIEST = 1e-30  # scale of a row of zeros: anything but 0

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape of one expert)
Source = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> (dtype, [E, ...])


class Codec(Protocol):
    """`begin` prepares rows once for all experts of a layer; `take` picks some of them."""

    name: str

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        """What one expert of a module with `tensors` consists of in the pack."""

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        """{name: [E, ...]} of a checkpoint -> {name: [E, ...]} of the pack, as in `layout`."""

    def begin(self, rows: torch.Tensor) -> Any:
        """[n, K] in the compute dtype -> what `take` and `multiply` want."""

    def take(self, rows: Any, places: torch.Tensor) -> Any:
        """Rows `places` of what `begin` gave."""

    def multiply(
        self, rows: Any, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool
    ) -> torch.Tensor:
        """rows [n, K] times the matrix `name` -> [n, N] in the compute dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NativeCodec:
    """The checkpoint's bytes, widened to the compute dtype when they are used.

    A widened matrix lies in one reused buffer, valid until the next one is asked for.
    """

    name = "native"

    def __init__(self, compute_dtype: torch.dtype) -> None:
        self._dtype = compute_dtype
        self._buffer = torch.empty(0, dtype=compute_dtype)

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        return {
            name: (dtype_name(dtype), tuple(shape[1:])) for name, (dtype, shape) in tensors.items()
        }

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        return dict(tensors)

    def begin(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def take(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, places)

    def multiply(
        self,
        rows: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        transposed: bool,
    ) -> torch.Tensor:
        weight = self._widen(tensors[name])
        return rows @ weight if transposed else F.linear(rows, weight)

    def _widen(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == self._dtype:
            return weight
        count = weight.numel()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self._dtype, device=weight.device)
        return self._buffer[:count].view(weight.shape).copy_(weight)


Quantized = tuple[torch.Tensor, torch.Tensor]  # int8 [n, K], fp32 [n, 1]


class Int8Codec:
    """Matrices as int8 [N, K] with fp32 scales [N]; everything else (biases) as fp32."""

    name = "int8"

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        found: Layout = {}
        for name, (_, shape) in tensors.items():
            if len(shape) != 3:
                found[name] = ("float32", tuple(shape[1:]))
                continue
            rows, columns = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
            found[name] = ("int8", (rows, columns))
            found[f"{name}.{SCALE}"] = ("float32", (rows,))
        return found

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.dim() != 3:
                found[name] = tensor.float()
                continue
            matrix = tensor.transpose(1, 2) if transposed else tensor
            found[name] = torch.empty(matrix.shape, dtype=torch.int8)
            scales = torch.empty(matrix.shape[:2], dtype=torch.float32)
            for expert, weight in enumerate(matrix):  # one at a time: fp32 of a layer is large
                values, scale = quantize_rows(weight.float())
                found[name][expert] = values
                scales[expert] = scale[:, 0]
            found[f"{name}.{SCALE}"] = scales
        return found

    def begin(self, rows: torch.Tensor) -> Quantized:
        return quantize_rows(rows)

    def take(self, rows: Quantized, places: torch.Tensor) -> Quantized:
        return rows[0].index_select(0, places), rows[1].index_select(0, places)

    def multiply(
        self, rows: Quantized, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool
    ) -> torch.Tensor:
        return multiply_int8(rows, tensors[name], tensors[f"{name}.{SCALE}"])


def quantize_rows(rows: torch.Tensor) -> Quantized:
    """fp32 [n, K] -> int8 [n, K] and fp32 [n, 1]: symmetric, each row by its own maximum."""
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True)
    scale = largest.mul_(1 / LARGEST).clamp_(min=TINIEST)
    return torch.div(rows, scale).round_().to(torch.int8), scale


def multiply_int8(rows: Quantized, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [n, K] x int8 [N, K] with their scales -> fp32 [n, N]; the sum is exact."""
    values, row_scale = rows
    return torch._int_mm(values, weight.t()).mul(scale).mul_(row_scale)


def multiply_fine(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [n, K] x int8 [N, K] with scales [N] -> fp32 [n, N], the rows in two int8 digits.

    One digit per number is too coarse for rows with a few very large numbers. The second holds
    what the first rounds away, in steps of 1/254 of the first's: 15 bits in one product of 2n rows.
    """
    count = rows.shape[0]
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True)
    row_scale = largest.mul_(1 / LARGEST).clamp_(min=TINIEST)
    exact = torch.div(rows, row_scale)
    first = exact.round()
    second = exact.sub_(first).mul_(SECOND_DIGIT).round_()
    digits = torch.cat([first, second]).to(torch.int8)
    products = torch._int_mm(digits, weight.t()).mul(scale)
    whole = torch.add(products[:count], products[count:], alpha=1 / SECOND_DIGIT)
    return whole.mul_(row_scale)


FORMATS = ("native", "int8")


def codec_of(name: str, compute_dtype: torch.dtype) -> Codec:
    """The codec that `--expert-format` names (one of FORMATS)."""
    return NativeCodec(compute_dtype) if name == "native" else Int8Codec()
