"""Routers that factorized models have and their stock classes do not."""

from .carried import CarriedRouter, carry_routers, load_routers

__all__ = ["CarriedRouter", "carry_routers", "load_routers"]
