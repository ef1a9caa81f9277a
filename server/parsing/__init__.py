"""What a chat model writes, taken apart as it comes: reasoning, answer, tool calls."""

from .deltas import Delta, ToolCallDelta

__all__ = ["Delta", "ToolCallDelta"]
