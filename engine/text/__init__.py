"""Text to token ids and back, whatever the tokenizer is."""

from .chat_template import ChatTemplate, TemplateFacts
from .text_stream import Piece, TextStream
from .tokenizer import Tokenizer, TokenizerInfo

__all__ = ["ChatTemplate", "Piece", "TemplateFacts", "TextStream", "Tokenizer", "TokenizerInfo"]
