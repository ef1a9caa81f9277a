"""The plan of a factorization as a file, storage, errors. Lowest wing."""

from .deltas import BITS, PARTS, DeltaFacts, Deltas, low_rank
from .errors import DownloadCorrupt, FactorizeError, SourceRefused
from .folder_note import damage, file_sha256, looks_whole, write_note
from .groups import expert_groups, expert_members, with_none
from .layer_experts import least_loss
from .options import ROUTERS, SCALES, SPLITS, SplitOptions
from .plan import BYTES_FORMAT, Plan, PlanFacts
from .router_weights import ACTIVATIONS, RouterWeights
from .storage import disk_errors, exclusive, publish, require_free, scratch, staged, sweep
from .work_folder import Tensors, WorkFolder, key_of, tensors_sha256

__all__ = [
    "ACTIVATIONS",
    "BITS",
    "DeltaFacts",
    "Deltas",
    "DownloadCorrupt",
    "FactorizeError",
    "PARTS",
    "BYTES_FORMAT",
    "Plan",
    "PlanFacts",
    "ROUTERS",
    "RouterWeights",
    "SCALES",
    "SPLITS",
    "SourceRefused",
    "SplitOptions",
    "Tensors",
    "WorkFolder",
    "damage",
    "disk_errors",
    "exclusive",
    "expert_groups",
    "expert_members",
    "file_sha256",
    "key_of",
    "least_loss",
    "looks_whole",
    "low_rank",
    "publish",
    "require_free",
    "scratch",
    "staged",
    "sweep",
    "tensors_sha256",
    "with_none",
    "write_note",
]
