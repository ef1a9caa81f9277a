"""What a chat model writes, taken apart as it comes: reasoning, answer, tool calls."""

from .deltas import Delta, ToolCallDelta
from .formats import (
    ReasoningFormat,
    ToolFormat,
    reasoning_format_of,
    starts_in_reasoning,
    tool_format_of,
)
from .parser import ChatParser, make_parser

__all__ = [
    "ChatParser",
    "Delta",
    "ReasoningFormat",
    "ToolCallDelta",
    "ToolFormat",
    "make_parser",
    "reasoning_format_of",
    "starts_in_reasoning",
    "tool_format_of",
]
