"""What moestro wrote beside a checkpoint that it factorized itself (`moestro.json`).

Stock transformers ignores the file: the checkpoint is exact without it at its own experts per
token. The engine needs it to serve another number of experts with the right output scale.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moestro.cache import read_fields
from moestro.engine.facts import ModelRefused

MANIFEST_NAME = "moestro.json"
MANIFEST_FORMAT = 1
# Where they are so, nothing is said.
# Where they are so, nothing is said.
UNSAID = {"deltas_sha256": "", "sequence_density": 0.0, "neurons": 0}
COUNTS = ("experts_per_token", "num_experts", "output_factor")


@dataclass(frozen=True, slots=True)
class Manifest:
    """`output_factor` is folded into every `down_proj`; K experts need K / output_factor."""

    experts_per_token: int
    num_experts: int
    output_factor: float
    source: str  # the dense model, in words
    method: str  # how it was split and routed, in words
    plan_sha256: str
    deltas_sha256: str = ""  # of what was added to the dense weights; empty: they are as they were
    sequence_density: float = 0.0  # what a prompt keeps where no router chooses; else 0
    neurons: int = 0  # of the dense model's FFN, where the experts have places for more; else 0

    @property
    def has_router(self) -> bool:
        """False: a token takes all experts, unless its prompt has chosen some."""
        return self.sequence_density == 0

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """None where the folder has no manifest; ModelRefused where it is not readable."""
        path = folder / MANIFEST_NAME
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text("utf-8"))
            if not isinstance(fields, dict) or "format" not in fields:
                raise ValueError("no JSON object with a format")
            if fields.pop("format") != MANIFEST_FORMAT:
                raise ModelRefused(f"{path} is of a format that this version does not read")
            found = read_fields(cls, UNSAID | fields, COUNTS)
            if not 0 <= found.sequence_density <= 1:
                raise ValueError("sequence_density is no share")
            return found
        except (OSError, ValueError, RecursionError) as error:
            raise ModelRefused(f"{path} is not a manifest of moestro: {error}") from error

    def write(self, folder: Path) -> None:
        said = asdict(self)
        for name, value in UNSAID.items():  # older versions read it, too
            if said[name] == value:
                del said[name]
        text = json.dumps({"format": MANIFEST_FORMAT, **said}, indent=1) + "\n"
        (folder / MANIFEST_NAME).write_text(text, "utf-8")
