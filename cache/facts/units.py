"""Bytes for people: the one place where messages of this room turn numbers into words."""

_STEPS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def human_bytes(count: int) -> str:
    """At most one decimal, rounded up: a budget copied from a message is never too small."""
    for unit, size in _STEPS:
        if count >= size:
            whole, tenths = divmod(-(-count * 10 // size), 10)
            return f"{whole}.{tenths} {unit}" if tenths else f"{whole} {unit}"
    return f"{count} bytes"
