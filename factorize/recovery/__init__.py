"""Brings a factorized model nearer to the dense one that it is made of."""

from .layer_losses import TRIES, measured_layers
from .recover import MODES, RANK, STAGES, RecoverOptions, recover, recovery_modes, recovery_stages

__all__ = [
    "MODES",
    "RANK",
    "STAGES",
    "TRIES",
    "RecoverOptions",
    "measured_layers",
    "recover",
    "recovery_modes",
    "recovery_stages",
]
