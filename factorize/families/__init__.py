"""Which dense families a stock class with experts carries exactly, and how their tensors read."""

from .family import Family, LayerKind, Part, Parts
from .table import FAMILIES, carried_words, obstacles
from .twin import SINK, SINKS, layer_fields, sink_names, stored_name, twin_class

__all__ = [
    "FAMILIES",
    "Family",
    "LayerKind",
    "Part",
    "Parts",
    "SINK",
    "SINKS",
    "carried_words",
    "layer_fields",
    "obstacles",
    "sink_names",
    "stored_name",
    "twin_class",
]
