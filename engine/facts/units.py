"""Sizes that several parts count in."""

GIB = 1 << 30
MIB = 1 << 20
ROUND_TOKENS = 64  # KV capacities are rounded up so that freed buffers fit the next sequence


def round_up_tokens(tokens: int) -> int:
    return -(-tokens // ROUND_TOKENS) * ROUND_TOKENS
