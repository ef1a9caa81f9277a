"""Experts and neurons of the rest of a sequence, chosen by its prompt (GRIFFIN, 2404.01365)."""

from .keep import kept_count, largest
from .ranking import Ranking, ranking_of
from .rows import Copy, Kept, PromptShares, Spread, StepRows
from .sequences import NeuronLayer, PartRows, SequenceExperts

__all__ = [
    "Copy",
    "Kept",
    "NeuronLayer",
    "PartRows",
    "PromptShares",
    "Ranking",
    "SequenceExperts",
    "Spread",
    "StepRows",
    "kept_count",
    "largest",
    "ranking_of",
]
