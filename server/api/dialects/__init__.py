"""One file per API that clients speak."""

from .completions import router as completions_router
from .tokenizer import router as tokenizer_router

__all__ = ["completions_router", "tokenizer_router"]
