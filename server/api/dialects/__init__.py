"""The APIs that clients speak, one router each."""

from .chat import router as chat_router
from .completions import router as completions_router
from .models import router as models_router
from .tokenizer import router as tokenizer_router

__all__ = ["chat_router", "completions_router", "models_router", "tokenizer_router"]
