"""One file per API that clients speak."""

from .completions import router as completions_router

__all__ = ["completions_router"]
