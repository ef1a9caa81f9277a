"""Checks and measurements on a real GPU, made to be run where nobody of us looks on."""

from .bench import Bench, Opener, Sizes
from .checks import Checked, check_gpu
from .found import Check, Found, Outcome, Status, run_checks
from .geometry import Geometry, fitted

__all__ = [
    "Bench",
    "Check",
    "Checked",
    "Found",
    "Geometry",
    "Opener",
    "Outcome",
    "Sizes",
    "Status",
    "check_gpu",
    "fitted",
    "run_checks",
]
