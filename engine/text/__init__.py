"""Text to token ids and back, whatever the tokenizer is."""

from .text_stream import Piece, TextStream
from .tokenizer import Tokenizer, TokenizerInfo

__all__ = ["Piece", "TextStream", "Tokenizer", "TokenizerInfo"]
