"""Text to token ids and back, whatever the tokenizer is; grammars over its tokens."""

from .chat_template import ChatTemplate, TemplateFacts
from .grammar import CompiledGrammar, GrammarConstraint, GrammarFault, Grammars
from .text_stream import Piece, TextStream
from .tokenizer import Tokenizer, TokenizerInfo

__all__ = [
    "ChatTemplate",
    "CompiledGrammar",
    "GrammarConstraint",
    "GrammarFault",
    "Grammars",
    "Piece",
    "TemplateFacts",
    "TextStream",
    "Tokenizer",
    "TokenizerInfo",
]
