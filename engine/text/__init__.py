"""Text to token ids and back, whatever the tokenizer is."""

from .tokenizer import TextStream, Tokenizer

__all__ = ["TextStream", "Tokenizer"]
