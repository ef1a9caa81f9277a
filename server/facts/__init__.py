"""Settings and refusals. Lowest wing: no engine, so that a wrong flag is answered at once."""

from .hub_name import HubName
from .refusal import Refused, refusal_line
from .settings import (
    EXPERT_FORMATS,
    Places,
    Settings,
    load_places,
    load_settings,
    misspelt_variables,
    parse_size,
    prepare_allocator,
)
from .size_words import size_words

__all__ = [
    "EXPERT_FORMATS",
    "HubName",
    "Places",
    "Refused",
    "Settings",
    "load_places",
    "load_settings",
    "misspelt_variables",
    "parse_size",
    "prepare_allocator",
    "refusal_line",
    "size_words",
]
