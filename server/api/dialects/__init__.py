"""The APIs that clients speak, one router each."""

from .completions import router as completions_router
from .models import router as models_router

__all__ = ["completions_router", "models_router"]
