"""Settings and refusals. Lowest wing: no engine, so that a wrong flag is answered at once."""

from .refusal import Refused, refusal_line
from .settings import EXPERT_FORMATS, Settings, load_places, load_settings, parse_size

__all__ = [
    "EXPERT_FORMATS",
    "Refused",
    "Settings",
    "load_places",
    "load_settings",
    "parse_size",
    "refusal_line",
]
