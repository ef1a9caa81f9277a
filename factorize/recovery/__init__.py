"""Brings a factorized model nearer to the dense one that it is made of."""

from .recover import STAGES, RecoverOptions, recover, recovery_modes, recovery_stages

__all__ = ["STAGES", "RecoverOptions", "recover", "recovery_modes", "recovery_stages"]
