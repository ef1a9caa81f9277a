"""What recovery adds to a dense model's FFN weights, as a file beside the plan it was made for.

Two kinds for each of gate, up and down: a product of two thin matrices in int8 (small enough for a
package), and a whole matrix in float16 (closed-form repair). Both may be there; they add up.
Letters: L layers, O outputs and I inputs of a matrix, r rank.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from moestro.cache import read_fields

from .described_file import read_described
from .errors import FactorizeError, SourceRefused

DELTAS_FORMAT = 1
METADATA_KEY = "moestro.deltas"
PARTS = ("gate", "up", "down")
COUNTS = ("steps", "tokens")


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

    (PART.scale, of their product), PART.whole float16 [L, O, I].
    """

    tensors: Mapping[str, torch.Tensor]
    facts: DeltaFacts

    def to_bytes(self) -> bytes:
        metadata = {METADATA_KEY: json.dumps({"format": DELTAS_FORMAT, **asdict(self.facts)})}
        return save(dict(self.tensors), metadata)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def write(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> "Deltas":
        """Raises FactorizeError when it is not a file of deltas, or of another version."""
        try:
            facts, tensors = read_described(path, METADATA_KEY)
            if facts.pop("format") != DELTAS_FORMAT:
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
        shapes = {
            "whole": (layers, outputs, inputs),
            "into": (layers, outputs, rank),
            "out_of": (layers, rank, inputs),
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
        if f"{part}.scale" in self.tensors:
            into = self.tensors[f"{part}.into"][layer].double()
            out_of = self.tensors[f"{part}.out_of"][layer].double()
            for rank, scale in enumerate(self.tensors[f"{part}.scale"][layer].double()):
                total = total + (into[:, rank, None] * out_of[rank]) * scale
        return total.float()


def low_rank(
    part: str, into: torch.Tensor, out_of: torch.Tensor, rank: int
) -> dict[str, torch.Tensor]:
    """The tensors of one part from `into` [L, O, R] and `out_of` [L, R, I], cut to `rank` <= R.

    The singular vectors of the product, largest first, each rounded to int8 by its largest number.
    """
    intos, outs, scales = [], [], []
    for left, right in zip(into.double(), out_of.double(), strict=True):
        left_q, left_r = torch.linalg.qr(left)
        right_q, right_r = torch.linalg.qr(right.T)
        first, values, second = torch.linalg.svd(left_r @ right_r.T)
        columns = (left_q @ first)[:, :rank]
        rows = (second @ right_q.T)[:rank]
        left_scale = columns.abs().amax(dim=0).clamp_min(1e-30) / 127
        right_scale = rows.abs().amax(dim=1).clamp_min(1e-30) / 127
        intos.append((columns / left_scale).round().to(torch.int8))
        outs.append((rows / right_scale[:, None]).round().to(torch.int8))
        scales.append((values[:rank] * left_scale * right_scale).float())
    return {
        f"{part}.into": torch.stack(intos),
        f"{part}.out_of": torch.stack(outs),
        f"{part}.scale": torch.stack(scales),
    }
