"""The plan of a factorization as a file, storage, errors. Lowest wing."""

from .errors import DownloadCorrupt, FactorizeError, SourceRefused
from .plan import Plan, PlanFacts, SplitOptions
from .storage import disk_errors, exclusive, require_free, scratch, staged, sweep

__all__ = [
    "DownloadCorrupt",
    "FactorizeError",
    "Plan",
    "PlanFacts",
    "SourceRefused",
    "SplitOptions",
    "disk_errors",
    "exclusive",
    "require_free",
    "scratch",
    "staged",
    "sweep",
]
