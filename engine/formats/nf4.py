"""`nf4`: four-bit normal floats by bitsandbytes, per expert and matrix (arXiv 2305.14314).

Made for CUDA, where a kernel multiplies with the packed bytes; on a CPU every use expands the whole
matrix first. An expert's blob holds all that bitsandbytes keeps beside the packed weights: the
largest number of each block and the table of the 16 values; shapes say the rest. The library is an
extra of this package, and imported when nf4 is asked for.

Shape letters: E experts, N outputs, K inputs, n rows, b numbers per block.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from moestro.engine.facts import ModelRefused, StartError

from .matrices import (
    Layout,
    Source,
    Span,
    biases,
    biases_layout,
    matrices_of,
    matrix_sides,
    to_encode,
)

ABSMAX, CODE = "absmax", "code"  # beside matrix `x`: fp32 [N, K/b] and fp32 [16]
BLOCKS = (64, 32)
KIND = "nf4"


class Nf4Matrix(NamedTuple):
    """Views into a slot."""

    packed: torch.Tensor  # uint8 [N * K/2, 1]
    state: Any  # bitsandbytes' QuantState, of the compute dtype


class Nf4Codec:
    """Matrices as nf4 with their quantization state; everything else (biases) as fp32."""

    name = "nf4"
    tiled = False

    def __init__(self, compute_dtype: torch.dtype, device: str = "cpu") -> None:
        """`device`: the kind that computes, which also encodes.

        Raises StartError where bitsandbytes is not installed.
        """
        self._dtype, self._device = compute_dtype, device
        self._library = _bitsandbytes()

    def layout(self, tensors: Source, transposed: bool) -> Layout:
        found = biases_layout(tensors)
        for name, outputs, inputs in matrix_sides(tensors, transposed):
            if inputs % BLOCKS[-1]:
                raise ModelRefused(
                    f"--expert-format nf4: the rows of {name} have {inputs} numbers, and only"
                    f" multiples of {BLOCKS[-1]} can be kept in it; use int8"
                )
            found[name] = ("uint8", (outputs, inputs // 2))
            found[f"{name}.{ABSMAX}"] = ("float32", (outputs, inputs // _block(inputs)))
            found[f"{name}.{CODE}"] = ("float32", (16,))
        return found

    def encode(
        self, tensors: Mapping[str, torch.Tensor], transposed: bool
    ) -> dict[str, torch.Tensor]:
        found = biases(tensors)
        for name, matrix in matrices_of(tensors, transposed):
            three = [self._quantize(weight) for weight in matrix]
            found[name] = torch.stack([packed for packed, _, _ in three])
            found[f"{name}.{ABSMAX}"] = torch.stack([absmax for _, absmax, _ in three])
            found[f"{name}.{CODE}"] = torch.stack([code for _, _, code in three])
        return found

    def open(self, tensors: Mapping[str, torch.Tensor], name: str, transposed: bool) -> Nf4Matrix:
        packed, absmax = tensors[name], tensors[f"{name}.{ABSMAX}"]
        outputs, inputs = packed.shape[0], 2 * packed.shape[1]
        state = self._library.functional.QuantState(
            absmax=absmax.view(-1),
            shape=torch.Size((outputs, inputs)),
            code=tensors[f"{name}.{CODE}"],
            blocksize=inputs // absmax.shape[1],
            quant_type=KIND,
            dtype=self._dtype,
        )
        return Nf4Matrix(packed.view(-1, 1), state)

    def begin(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def take(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return rows.index_select(0, places)

    def multiply(self, rows: torch.Tensor, matrix: Nf4Matrix) -> torch.Tensor:
        # Takes the kernel for so many rows: gemv for one, expanding first for many.
        out: torch.Tensor = self._library.matmul_4bit(rows, matrix.packed, matrix.state)
        return out

    def multiply_each(
        self, rows: torch.Tensor, spans: Sequence[Span], matrices: Sequence[Nf4Matrix]
    ) -> torch.Tensor:
        parts = [
            self.multiply(rows[start:end], matrix)
            for (start, end), matrix in zip(spans, matrices, strict=True)
        ]
        return torch.cat(parts)

    def multiply_apart(self, rows: torch.Tensor, matrices: Sequence[Nf4Matrix]) -> torch.Tensor:
        each = torch.split(rows, 1) if len(rows) > 1 else (rows,) * len(matrices)
        parts = [self.multiply(row, matrix) for row, matrix in zip(each, matrices, strict=True)]
        return torch.cat(parts)

    def _quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, K] -> uint8 [N, K/2], fp32 [N, K/b], fp32 [16]."""
        outputs, inputs = weight.shape
        packed, state = self._library.functional.quantize_4bit(
            to_encode(weight, self._device), blocksize=_block(inputs), quant_type=KIND
        )
        three = packed.view(outputs, -1), state.absmax.view(outputs, -1), state.code
        return three[0].cpu(), three[1].cpu(), three[2].cpu()


def _block(inputs: int) -> int:
    """Numbers that share a scale: blocks do not cross rows."""
    return next(block for block in BLOCKS if inputs % block == 0)


def _bitsandbytes() -> Any:
    # It warns of a package that it would like to fetch kernels with; nothing here needs them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise StartError(
            "--expert-format nf4 needs bitsandbytes: pip install 'moestro[nf4]' (or use int8)"
        ) from error
    return bitsandbytes
