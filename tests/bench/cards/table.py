"""Which share of a published model's experts a card would hold, and what its links would allow.

A model is a JSON file in `configs`: `source` names whose config.json it is, `config` has the fields
of it that a plan reads, and `billions` is how many parameters the model is said to have, which its
widths must come to (test_cards.py).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moestro.engine import CardForecast, EngineConfig, HostMemory, StartError, card_of, plan_card

CONFIGS = Path(__file__).parent / "configs"
GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24)
HOST_GIB = 64
LINK_BYTES_PER_S, DISK_BYTES_PER_S = 25e9, 3e9
FORMATS = ("native", "int8", "nf4")
NOT_THERE = "–"


@dataclass(frozen=True, slots=True)
class Model:
    """A published model, as far as a plan needs it."""

    source: str
    billions: float
    config: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> "Model":
        found = json.loads(file.read_text())
        return cls(found["source"], found["billions"], found["config"])

    @property
    def name(self) -> str:
        return self.source.partition("/")[2]

    @contextmanager
    def folder(self) -> Iterator[Path]:
        with TemporaryDirectory(prefix="moestro-card-") as made:
            Path(made, "config.json").write_text(json.dumps(self.config))
            yield Path(made)


def models() -> list[Model]:
    """The smallest first."""
    found = [Model.read(file) for file in CONFIGS.glob("*.json")]
    return sorted(found, key=lambda model: model.billions)


def planned(model: Model, card_gib: int) -> CardForecast | None:
    """With experts in nf4; None where the card is too small for anything else than experts."""
    with model.folder() as folder:
        config = EngineConfig(
            folder,
            folder / "cache",
            expert_format="nf4",
            device="cuda",
            device_memory_bytes=card_gib * GIB,
        )
        try:
            card = card_of(config)
            assert card is not None
            return plan_card(
                config,
                card,
                LINK_BYTES_PER_S,
                DISK_BYTES_PER_S,
                machine=HostMemory((HOST_GIB * GIB, "a host")),
            )
        except StartError:
            return None


def shares(found: CardForecast | None) -> str:
    """Percent of the experts on the card in each of FORMATS."""
    if found is None:
        return NOT_THERE
    shares = {one.expert_format: one.share for one in found.formats} | {"nf4": found.resident_share}
    each = (shares[name] for name in FORMATS)
    return " / ".join(NOT_THERE if share is None else f"{100 * share:.0f}" for share in each)


def bounds(found: CardForecast | None) -> str:
    """Tokens per second that link and disk allow while one sequence decodes, in nf4."""
    if found is None:
        return NOT_THERE
    low, high = found.decode.low.tokens_per_s, found.decode.high.tokens_per_s
    if low is None:
        return "no bound"
    least, most = _two_digits(low), "no bound" if high is None else _two_digits(high)
    return most if most == least else f"{least} to {most}"


def _two_digits(number: float) -> str:
    return f"{float(f'{number:.2g}'):g}"


def row(model: Model) -> tuple[str, str]:
    """The model's lines of the two tables."""
    found = [planned(model, card_gib) for card_gib in CARDS_GIB]
    known = next(one for one in reversed(found) if one is not None) if any(found) else None
    experts = NOT_THERE
    if known is not None:
        layer = known.work.layers[0]
        experts = f"{len(known.work.layers)} x {layer.num_experts}, {layer.experts_per_token}"
    start = f"| {model.name} | {model.billions:g} |"
    return (
        f"{start} {experts} | " + " | ".join(map(shares, found)) + " |",
        f"{start} " + " | ".join(map(bounds, found)) + " |",
    )
