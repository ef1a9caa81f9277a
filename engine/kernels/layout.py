"""Where the weights of a matrix lie that the library multiplies with: `tile16`.

A matrix of N outputs and K inputs is cut into tiles of 16 outputs. A tile is one stream of bytes,
read once from its beginning to its end. Its unit is a *line* of 64 bytes: for each of the 16
outputs the four bytes that hold its next inputs, so that one load feeds 16 sums.

    tile 0 | tile 1 | ...                                                        (tile_bytes each)
    tile   = line | line | ... | scales                                                     (int8)
           = line | ... | scales | zeros | line | ... | scales | zeros | ...        (int4, group)
    line   = output 0: b0 b1 b2 b3 | output 1: b0 b1 b2 b3 | ... | output 15: b0 b1 b2 b3

    format    inputs of a line, and what an output's four bytes are (k: the line's first input)
    float32    1   the number
    bfloat16   2   k, k + 1                     float16 alike
    fp8        4   k ... k + 3, e4m3            after each group 16 scales: they multiply
    int8       4   k ... k + 3, each + 128      after all lines 16 scales
    int4       8   byte j: k + j in its low half, k + 4 + j in its high one; 0 to 15
                   after each group 16 scales, then 16 zeros as the format says:
                   none      w = scale * (q - 8)
                   integer   w = scale * (q - zero), a zero being a byte
                   float     w = scale * q + zero, a zero being of the scales' type
    mxfp4      8   as int4, codes e2m1          after each group of 32 the 16 exponents: 2^(e - 127)

Inputs are padded with weights of zero to whole groups, outputs to whole tiles. Scales are float32,
bfloat16 or float16. A GPU reads the same bytes: a line is the fragment of 16 outputs that its
matrix instructions take, four bytes in each of 16 lanes; int8 there is the stored byte xor 0x80.

Shape letters: N outputs, K inputs, T tiles.
"""

from dataclasses import dataclass
from math import prod

import torch

TILE16 = "tile16"
ROWS = "rows"  # the other order there is: of torch's products, one output behind the other
TILE_ROWS = 16
LINE_BYTES = 64
UNIT = 32  # inputs: what int8 pads to
WIDEST_GROUP = 0x8000  # integers are summed in 32 bits

KINDS = ("float32", "bfloat16", "float16", "fp8", "int8", "int4", "mxfp4")
SCALES = ("float32", "bfloat16", "float16")
ZEROS = ("none", "integer", "float")
_INPUTS_OF_LINE = dict(zip(KINDS, (1, 2, 2, 4, 4, 8, 8), strict=True))


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@dataclass(frozen=True, slots=True)
class TileFormat:
    """How the weights of one matrix are kept."""

    kind: str  # of KINDS
    group: int = 0  # inputs that share a scale; 0: none, or all of a row
    scale: str = "float32"  # of SCALES
    zero: str = "none"  # of ZEROS; of int4 alone

    @property
    def tag(self) -> str:
        """All of it in one word."""
        return f"{self.kind}.{self.group}.{self.scale}.{self.zero}"

    @classmethod
    def of_tag(cls, tag: str) -> "TileFormat":
        kind, group, scale, zero = tag.split(".")
        return cls(kind, int(group), scale, zero)

    @property
    def is_float(self) -> bool:
        """Multiplied with as floats: the rows stay fp32."""
        return KINDS.index(self.kind) <= KINDS.index("fp8")

    @property
    def inputs_of_line(self) -> int:
        """Inputs whose weights one line of LINE_BYTES holds."""
        return _INPUTS_OF_LINE[self.kind]

    def padded(self, inputs: int) -> int:
        """Inputs of a tile."""
        unit = UNIT if self.kind in ("int8", "int4") else _INPUTS_OF_LINE[self.kind]
        return _round_up(inputs, self.group or unit)

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale, in a matrix of so many."""
        return self.group or self.padded(inputs)

    @property
    def _after_group_bytes(self) -> int:
        """Of scales and zeros."""
        if self.kind == "mxfp4":
            return TILE_ROWS
        if self.kind in SCALES:
            return 0
        scales = TILE_ROWS * (4 if self.scale == "float32" else 2)
        return scales + {"none": 0, "integer": TILE_ROWS, "float": scales}[self.zero]

    def tile_bytes(self, inputs: int) -> int:
        padded = self.padded(inputs)
        lines = padded // _INPUTS_OF_LINE[self.kind]
        groups = 1 if self.kind == "int8" else padded // self.group_of(inputs)
        return lines * LINE_BYTES + groups * self._after_group_bytes

    def shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Of the matrix's bytes: [T, tile_bytes]."""
        return -(-outputs // TILE_ROWS), self.tile_bytes(inputs)


def lines(rows: torch.Tensor) -> torch.Tensor:
    """Bytes of each output in order, uint8 [N, ...] of four each -> [T, ..., 64]: as lines."""
    outputs, fours = rows.shape[0], prod(rows.shape[1:]) // 4
    filled = -outputs % TILE_ROWS
    if filled:
        rows = torch.cat([rows, rows.new_zeros((filled, *rows.shape[1:]))])
    words = rows.contiguous().view(-1, 4 * fours).view(torch.int32)
    by_tile = words.view(-1, TILE_ROWS, fours).transpose(1, 2).contiguous()
    return by_tile.view(len(by_tile), -1).view(torch.uint8)


def by_tile(each: torch.Tensor) -> torch.Tensor:
    """What each output has for each group, [N, groups] -> uint8 [T, groups, bytes of 16]."""
    filled = -each.shape[0] % TILE_ROWS
    if filled:
        each = torch.cat([each, each.new_zeros((filled, each.shape[1]))])
    tiles = each.view(-1, TILE_ROWS, each.shape[1]).transpose(1, 2).contiguous()
    return tiles.view(torch.uint8)
