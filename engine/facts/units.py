"""Sizes that several parts count in."""

GIB = 1 << 30
MIB = 1 << 20
PAGE_TOKENS = 16  # the KV is given out in pages of so many tokens


def round_up_tokens(tokens: int) -> int:
    """To whole pages."""
    return -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
