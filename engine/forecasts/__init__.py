"""What a memory plan is worth: speeds, hit rates, smaller formats, and what would change it."""

from .advice import Change, changes, flags_of, nearest_plan
from .auto_format import FINEST_FIRST, Understood, share_of, understand_settled
from .calibrate import Matrices, measure_link, measure_multiply
from .card import PCIE_4_BYTES_PER_S, CardBound, CardForecast, CardLinks, CardOutlook, FormatShare
from .forecast import (
    Bound,
    ComputeSpeed,
    Forecast,
    LinkSpeed,
    MoeLayer,
    Outlook,
    Rates,
    Traced,
    Work,
)
from .gains import DEMO_PERPLEXITY, Gains
from .own_grid import own_grid_line
from .token_reads import gains_of

__all__ = [
    "DEMO_PERPLEXITY",
    "FINEST_FIRST",
    "PCIE_4_BYTES_PER_S",
    "Bound",
    "CardBound",
    "CardForecast",
    "CardLinks",
    "CardOutlook",
    "Change",
    "ComputeSpeed",
    "Forecast",
    "FormatShare",
    "Gains",
    "LinkSpeed",
    "Matrices",
    "MoeLayer",
    "Outlook",
    "Rates",
    "Traced",
    "Understood",
    "Work",
    "changes",
    "flags_of",
    "gains_of",
    "measure_link",
    "measure_multiply",
    "nearest_plan",
    "own_grid_line",
    "share_of",
    "understand_settled",
]
