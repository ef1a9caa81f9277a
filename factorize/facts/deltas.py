"""What recovery adds to a dense model's FFN weights, as a file beside the plan it was made for.

Two kinds for each of gate, up and down: a product of two thin matrices in int8 (small enough for a
package, in int4 at half of that), and a whole matrix in float16 (closed-form repair). Both may be
there; they add up. Letters: L layers, O outputs and I inputs of a matrix, r rank.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch.nn import functional

from moestro.cache import read_fields

from .described_file import read_described, replace_file
from .errors import FactorizeError, SourceRefused

DELTAS_FORMATS = {8: 1, 4: 2}  # of a file, by the bits of its thin matrices
BITS = tuple(DELTAS_FORMATS)
METADATA_KEY = "moestro.deltas"
PARTS = ("gate", "up", "down")
COUNTS = ("steps", "tokens")
SHARES = tuple(share / 20 for share in range(8, 21))  # of a vector's largest number, where to cut


@dataclass(frozen=True, slots=True)
class DeltaFacts:
    """What deltas remember about their making."""

    plan_sha256: str  # of the plan that they go with
    texts_sha256: str
    method: str
    command: str
    steps: int  # of distillation
    tokens: int  # that recovery has read


@dataclass(frozen=True, slots=True)
class Deltas:
    """`tensors`: PART.into int8 [L, O, r] and PART.out_of int8 [L, r, I] with scales float32 [L, r]

    (PART.scale, of their product), PART.whole float16 [L, O, I]. With four bits a number, `into` is
    uint8 [L, O, (r + 1) // 2] and `out_of` uint8 [L, (r + 1) // 2, I]: see `_packed`.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: DeltaFacts

    def to_bytes(self) -> bytes:
        said = {"format": DELTAS_FORMATS[self.bits], **asdict(self.facts)}
        return save(dict(self.tensors), {METADATA_KEY: json.dumps(said)})

    @property
    def bits(self) -> int:
        """Of a number of the thin matrices."""
        return 4 if any(tensor.dtype == torch.uint8 for tensor in self.tensors.values()) else 8

    @property
    def rank(self) -> int:
        """Of the thin matrices; 1 where there are none."""
        return max(
            (t.shape[1] for name, t in self.tensors.items() if name.endswith(".scale")), default=1
        )

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def of_plan(self, plan_sha256: str) -> "Deltas":
        """The same, for a plan that differs in how many experts its layers take."""
        return replace(self, facts=replace(self.facts, plan_sha256=plan_sha256))

    def write(self, path: Path) -> None:
        replace_file(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> "Deltas":
        """Raises FactorizeError when it is not a file of deltas, or of another version."""
        try:
            facts, tensors = read_described(path, METADATA_KEY)
            if facts.pop("format") not in DELTAS_FORMATS.values():
                raise FactorizeError(
                    f"{path} has deltas of a format that this version does not read"
                )
            return cls(tensors, read_fields(DeltaFacts, facts, COUNTS))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FactorizeError(f"{path} has no deltas of moestro: {error}") from error

    def check_fits(self, layers: int, neurons: int, hidden: int, plan_sha256: str) -> None:
        """Raises SourceRefused unless they were made for this plan of a model of these shapes."""
        if plan_sha256 != self.facts.plan_sha256:
            raise SourceRefused(
                "the deltas were made for another plan; give the two files that one recovery wrote"
            )
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != self._shape(name, layers, neurons, hidden):
                raise SourceRefused(f"the deltas' {name} does not fit the model; make them anew")

    def _shape(self, name: str, layers: int, neurons: int, hidden: int) -> tuple[int, ...]:
        """Raises SourceRefused for a name that says nothing."""
        part, _, what = name.partition(".")
        outputs, inputs = (hidden, neurons) if part == "down" else (neurons, hidden)
        scale = self.tensors.get(f"{part}.scale")
        rank = 0 if scale is None else scale.shape[-1]
        held = rank if self.bits == 8 else (rank + 1) // 2
        shapes = {
            "whole": (layers, outputs, inputs),
            "into": (layers, outputs, held),
            "out_of": (layers, held, inputs),
            "scale": (layers, rank),
        }
        if part not in PARTS or what not in shapes:
            raise SourceRefused(f"the deltas have a tensor {name} that this version does not know")
        return shapes[what]

    def add_to(self, weight: torch.Tensor, part: str, layer: int) -> torch.Tensor:
        """`weight` [O, I] of one layer with its delta, float32; the same bits on every machine.

        Element by element and rank by rank in float64: a matrix product would sum in another order
        elsewhere.
        """
        total = weight.double()
        if f"{part}.whole" in self.tensors:
            total = total + self.tensors[f"{part}.whole"][layer].double()
        if (thin := self.thin(part, layer)) is not None:
            into, out_of, scales = (tensor.double() for tensor in thin)
            for rank, scale in enumerate(scales):
                total = total + (into[:, rank, None] * out_of[rank]) * scale
        return total.float()

    def thin(self, part: str, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(`into` int8 [O, r], `out_of` int8 [r, I], `scale` [r]) of one layer, where there are."""
        if f"{part}.scale" not in self.tensors:
            return None
        names = ("into", "out_of", "scale")
        into, out_of, scale = (self.tensors[f"{part}.{name}"][layer] for name in names)
        if into.dtype == torch.uint8:
            into = _unpacked(into.T)[: len(scale)].T
            out_of = _unpacked(out_of)[: len(scale)]
        return into, out_of, scale


def low_rank(
    part: str, into: torch.Tensor, out_of: torch.Tensor, rank: int, bits: int = 8
) -> dict[str, torch.Tensor]:
    """The tensors of one part from `into` [L, O, R] and `out_of` [L, R, I], cut to `rank` <= R.

    The singular vectors of the product, largest first, each rounded to integers of `bits` bits.
    """
    columns, rows, scales = [], [], []
    for left, right in zip(into.double(), out_of.double(), strict=True):
        left_q, left_r = torch.linalg.qr(left)
        right_q, right_r = torch.linalg.qr(right.T)
        first, values, second = torch.linalg.svd(left_r @ right_r.T)
        column, column_scale = _rounded((left_q @ first).T[:rank], bits)
        row, row_scale = _rounded((second @ right_q.T)[:rank], bits)
        columns.append(column)
        rows.append(row)
        scales.append((values[:rank] * column_scale * row_scale).float())
    thin = torch.stack(columns), torch.stack(rows)  # [L, r, O], [L, r, I]
    if bits == 4:
        thin = _packed(thin[0]), _packed(thin[1])
    return {
        f"{part}.into": thin[0].transpose(1, 2).contiguous(),
        f"{part}.out_of": thin[1],
        f"{part}.scale": torch.stack(scales),
    }


def _rounded(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`vectors` [r, N] as (int8 [r, N], the number [r] that one step of each is).

    With four bits the largest numbers are cut where that brings the rest nearer.
    """
    most = 2 ** (bits - 1) - 1
    largest = vectors.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    best, least = largest / most, vectors.new_full((len(vectors), 1), float("inf"))
    for share in SHARES if bits == 4 else (1.0,):
        step = largest * share / most
        lost = ((vectors / step).round().clamp(-most, most) * step - vectors).square()
        lost = lost.sum(dim=1, keepdim=True)
        best, least = torch.where(lost < least, step, best), torch.minimum(lost, least)
    return (vectors / best).round().clamp(-most, most).to(torch.int8), best[:, 0]


def _packed(vectors: torch.Tensor) -> torch.Tensor:
    """Of int8 [..., r, N] in -7 to 7, uint8 [..., (r + 1) // 2, N]: vector 2 j in the low halves

    of the bytes and 2 j + 1 in the high ones, each plus 8.
    """
    halves = functional.pad(vectors, (0, 0, 0, vectors.shape[-2] % 2)).to(torch.int16) + 8
    return (halves[..., ::2, :] + 16 * halves[..., 1::2, :]).to(torch.uint8)


def _unpacked(halves: torch.Tensor) -> torch.Tensor:
    """What `_packed` had [2 h, N], of uint8 [h, N]."""
    both = torch.stack([halves & 15, halves >> 4], dim=1).to(torch.int8) - 8
    return both.flatten(0, 1)
