"""How fast the products of a prompt alone are on this machine right now: the ceiling of P2.

python -m full.kernels GEOMETRY TOKENS FORMAT   (one JSON line; the benchmark starts it as a turn)
"""

import json
import sys
from dataclasses import asdict, dataclass

import report
import torch

from moestro.engine.formats import tile_format
from moestro.engine.kernels import Scratch, library, linear, tile_matrix

from .bars import rows_per_expert
from .geometry import Geometry

COLD_BYTES = 512 << 20  # more than any cache of the processor holds
DENSE_ROW_GROUP = 32  # inputs of dense rows that share a scale


@dataclass(frozen=True, slots=True)
class PromptBound:
    """The least seconds that the products of a prompt can take, and at which rates."""

    seconds: float
    experts_rate: float  # multiply-adds per second
    dense_rate: float
    rows_per_expert: float


def int_mm_rate(rows: int, outputs: int, inputs: int) -> float:
    """Multiply-adds per second of torch's int8 [rows, inputs] x [inputs, outputs], from memory."""
    count = max(2, COLD_BYTES // (outputs * inputs))
    weights = [torch.ones(outputs, inputs, dtype=torch.int8) for _ in range(count)]
    values = torch.ones(rows, inputs, dtype=torch.int8)
    out = torch.empty(rows, outputs, dtype=torch.int32)
    seconds = report.seconds(lambda: [torch._int_mm(values, w.t(), out=out) for w in weights], 3)
    return rows * outputs * inputs * count / seconds


def tile_rate(name: str, rows: int, outputs: int, inputs: int, row_group: int = 0) -> float:
    """The same of the format `name` in tiles, rows quantized and results scaled; else torch's."""
    if library() is None:
        return int_mm_rate(rows, outputs, inputs)
    form, count = (
        tile_format(name, torch.bfloat16, inputs),
        max(2, COLD_BYTES // (outputs * inputs)),
    )
    tiles = torch.full((count, *form.shape(outputs, inputs)), 7, dtype=torch.uint8)
    matrices = [tile_matrix(each, form, outputs, inputs, row_group) for each in tiles]
    values, scratch = torch.randn(rows, inputs), Scratch()
    seconds = report.seconds(lambda: [linear(values, m, None, scratch) for m in matrices], 3)
    return rows * outputs * inputs * count / seconds


def prompt_bound(shape: Geometry, tokens: int, name: str) -> PromptBound:
    """Of `tokens` tokens routed evenly: products of experts and dense rows at their own sizes.

    Experts in the format `name`, dense weights in int8.
    """
    rows = rows_per_expert(shape.experts, shape.experts_per_token, tokens)
    wide = tile_rate(name, round(rows), shape.expert_width, shape.hidden)
    narrow = tile_rate(name, round(rows), shape.hidden, shape.expert_width)
    experts_rate = 3 / (2 / wide + 1 / narrow)  # two wide matrices and a narrow one
    dense_rate = tile_rate("int8", tokens, shape.hidden, shape.hidden, DENSE_ROW_GROUP)
    experts = shape.layers * shape.experts_per_token * tokens * shape.expert_numbers
    dense = shape.layers * 4 * shape.hidden**2 * tokens
    seconds = experts / experts_rate + dense / dense_rate
    return PromptBound(seconds, experts_rate, dense_rate, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shape = Geometry(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(prompt_bound(shape, int(sys.argv[2]), sys.argv[3]))))
