"""Where every tensor lies: inside an expert's blob, and every blob inside the pack.

    pack   | header, padded to a page | layer 0                  | layer 1 ...
    layer  | blob of expert 0 | blob of expert 1 | ...           (neighbours touch: one read)
             in a mixed layer they differ in layout, and so in size
    blob   | tensor | gap to 64 | tensor | ... | gap to a page   (stride_bytes in all)

Pure arithmetic; knows no torch and no file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

PAGE_BYTES = 4096  # unit of direct reads; also what mmap aligns memory to
TENSOR_ALIGN_BYTES = 64  # a cache line and the widest vector register

PLAIN_ORDER = "rows"  # which headers do not name

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one expert: torch's dtype name without `torch.`, shape without experts."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"{self.name}: dtype {self.dtype!r} cannot be packed")

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class BlobLayout:
    """The tensors of one expert, side by side; `offsets[i]` is where `tensors[i]` begins."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> "BlobLayout":
        """From `{name: (dtype, shape of one expert)}`, in that order."""
        return cls(tuple(TensorSpec(name, dtype, tuple(s)) for name, (dtype, s) in tensors.items()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        found, end = [], 0
        for tensor in self.tensors:
            found.append(round_up(end, TENSOR_ALIGN_BYTES))
            end = found[-1] + tensor.size_bytes
        return tuple(found)

    @cached_property
    def size_bytes(self) -> int:
        """First byte after the last tensor."""
        return self.offsets[-1] + self.tensors[-1].size_bytes if self.tensors else 0

    @cached_property
    def stride_bytes(self) -> int:
        """From one expert's blob to the next one's; what one load reads."""
        return max(PAGE_BYTES, round_up(self.size_bytes, PAGE_BYTES))


@dataclass(frozen=True)
class PackLayer:
    """One experts module: its path in the model, how many experts, how each is laid out."""

    name: str
    num_experts: int
    layout: BlobLayout  # of every expert; of a mixed layer, the largest one
    each: tuple[BlobLayout, ...] = ()  # [expert], in a mixed layer only

    @classmethod
    def of(cls, name: str, layouts: Sequence[BlobLayout]) -> "PackLayer":
        """From one layout per expert (at least one); mixed where they are not all the same."""
        largest = max(layouts, key=lambda layout: layout.stride_bytes)
        mixed = any(layout != largest for layout in layouts)
        return cls(name, len(layouts), largest, tuple(layouts) if mixed else ())

    def layout_of(self, expert: int) -> BlobLayout:
        return self.each[expert] if self.each else self.layout

    @cached_property
    def kinds(self) -> tuple[BlobLayout, ...]:
        """The different layouts, in the order of the first expert of each; one if not mixed."""
        return tuple(dict.fromkeys(self.each)) or (self.layout,)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """[expert]: what one load of it reads."""
        return tuple(self.layout_of(expert).stride_bytes for expert in range(self.num_experts))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """[expert], from the layer's first blob; and the end of the last one."""
        return tuple(accumulate(self.strides, initial=0))

    @property
    def total_bytes(self) -> int:
        return self.offsets[-1]

    def runs(self, most_bytes: int) -> Iterator[range]:
        """All experts as runs of neighbours of at most `most_bytes`, or of one expert."""
        first = 0
        for expert in range(1, self.num_experts + 1):
            whole = expert == self.num_experts
            if whole or self.offsets[expert + 1] - self.offsets[first] > most_bytes:
                yield range(first, expert)
                first = expert


@dataclass(frozen=True)
class PackSpec:
    """All that decides what a pack's bytes are. Two packs of equal specs are interchangeable."""

    model: str  # fingerprint of the checkpoint the weights come from
    codec: str  # "native": the checkpoint's own dtype
    layers: tuple[PackLayer, ...]
    order: str = PLAIN_ORDER  # in which a matrix' numbers lie: a word of whoever computes with it

    @property
    def total_bytes(self) -> int:
        """All blobs, without the header."""
        return sum(layer.total_bytes for layer in self.layers)

    @property
    def num_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """What a slot must hold to take any expert of the model."""
        return max((layer.layout.stride_bytes for layer in self.layers), default=0)
