"""API keys: what one looks like, and files of them. No message ever shows one, or a part of one."""

import re
from pathlib import Path

MOST_KEYS = 1000  # each is compared with each request's
MOST_FILE_BYTES = 1 << 20

_KEY = re.compile(r"[!-~]+")


def parse_keys(value: object) -> object:
    """One key or a list of them, as a tuple. ValueError for what does not fit into a header."""
    if value is None:
        return ()
    keys = (value,) if isinstance(value, str) else value
    if isinstance(keys, list | tuple):
        for key in keys:
            if isinstance(key, str) and not _KEY.fullmatch(key):
                raise ValueError("a key must be of visible ASCII characters without spaces")
        return tuple(keys)
    return value


def read_keys(value: object) -> object:
    """The keys in the file of this name: one a line; empty lines and those with # are no keys.

    ValueError where it cannot be read, or has none, or what is none.
    """
    if not isinstance(value, str | Path):
        return value
    lines = [line.strip() for line in _text_of(value).splitlines()]
    keys = [(n, line) for n, line in enumerate(lines, 1) if line and not line.startswith("#")]
    for number, key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"line {number} is no key: one a line, of visible ASCII characters without spaces"
            )
    if not keys:
        raise ValueError("the file has no key: write one a line")
    if len(keys) > MOST_KEYS:
        raise ValueError(f"the file has {len(keys)} keys, the most is {MOST_KEYS}")
    return tuple(key for _, key in keys)


def _text_of(name: str | Path) -> str:
    try:
        with Path(name).expanduser().open("rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:  # no such user; a NUL in the name
        reason = getattr(error, "strerror", None) or "no such file"
        raise ValueError(f"cannot read {str(name)[:100]!r}: {reason}") from None
    if len(data) > MOST_FILE_BYTES:
        raise ValueError(f"the file is larger than {MOST_FILE_BYTES} bytes")
    return data.decode("latin-1")  # whatever is not ASCII is refused as a key
