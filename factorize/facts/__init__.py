"""The plan of a factorization as a file, storage, errors. Lowest wing."""

from .deltas import PARTS, DeltaFacts, Deltas, low_rank
from .errors import DownloadCorrupt, FactorizeError, SourceRefused
from .folder_note import damage, file_sha256, looks_whole, write_note
from .plan import Plan, PlanFacts, SplitOptions
from .storage import disk_errors, exclusive, publish, require_free, scratch, staged, sweep

__all__ = [
    "DeltaFacts",
    "Deltas",
    "DownloadCorrupt",
    "FactorizeError",
    "PARTS",
    "Plan",
    "PlanFacts",
    "SourceRefused",
    "SplitOptions",
    "damage",
    "disk_errors",
    "exclusive",
    "file_sha256",
    "looks_whole",
    "low_rank",
    "publish",
    "require_free",
    "scratch",
    "staged",
    "sweep",
    "write_note",
]
