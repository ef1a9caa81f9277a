"""What a config.json says of its checkpoint's quantization. No tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.engine.facts import ModelRefused

FIELD = "quantization_config"


@dataclass(frozen=True, slots=True)
class Quantization:
    """The fields of one `quantization_config`, which `path` has."""

    path: Path
    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Raises ModelRefused where none is named."""
        return self.text("quant_method")

    def text(self, name: str, default: str | None = None) -> str:
        """Raises ModelRefused for what is no text."""
        found = self.fields.get(name, default)
        if not isinstance(found, str):
            raise self.wrong(name, found, "text")
        return found

    def whole(self, name: str, allowed: Sequence[int], default: int | None = None) -> int:
        """One of the `allowed` whole numbers. Raises ModelRefused."""
        found = self.fields.get(name, default)
        if type(found) is not int or found not in allowed:
            raise self.wrong(name, found, f"one of {', '.join(map(str, allowed))}")
        return found

    def group_size(self) -> int:
        """Numbers that share a scale; -1: a row. Raises ModelRefused."""
        found = self.fields.get("group_size", -1)
        if type(found) is not int or (found < 1 and found != -1):
            raise self.wrong("group_size", found, "a whole number above 0, or -1")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """Raises ModelRefused."""
        found = self.fields.get(name, default)
        if not isinstance(found, bool):
            raise self.wrong(name, found, "true or false")
        return found

    def wrong(self, name: str, found: object, wanted: str) -> ModelRefused:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        return ModelRefused(f"{self.path}: {FIELD}.{name} is {shown}, and must be {wanted}")

    def misfit(self, key: str, words: str) -> ModelRefused:
        """Where a tensor is not what the fields, or the tensors beside it, say."""
        return ModelRefused(f"{self.path.parent}: {key} {words}; {FIELD} and the files disagree")


def quantization_of(path: Path, raw: Mapping[str, Any]) -> Quantization | None:
    """Of the config in `path`, whose text part may have it. Raises ModelRefused."""
    text_part = raw.get("text_config")
    for place in (raw, text_part if isinstance(text_part, dict) else {}):
        found = place.get(FIELD)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise ModelRefused(f"{path}: {FIELD} is not a JSON object")
        return Quantization(path, found) if found else None
    return None
