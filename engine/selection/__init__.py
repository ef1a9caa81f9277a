"""Which experts serve the rest of a sequence, chosen by its prompt (GRIFFIN, arXiv 2404.01365)."""

from .keep import kept_count, largest
from .ranking import Ranking, ranking_of
from .rows import Kept, PromptShares, Spread, StepRows
from .sequences import PartRows, SequenceExperts

__all__ = [
    "Kept",
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
