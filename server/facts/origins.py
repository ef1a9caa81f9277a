"""Web origins, as browsers send them: scheme, host and port, and nothing behind."""

import re

ANY_ORIGIN = "*"
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:(?P<port>\d{1,5}))?"
)
_OWN_PORTS = {"http": 80, "https": 443}  # browsers leave these out
_FORM = (
    "is no origin as browsers send it: such as https://app.example or http://localhost:3000, in"
    " small letters, without a path, and without the scheme's own port; or * for all"
)


def parse_origins(value: object) -> object:
    """'a,b' or ['a', 'b'] -> ('a', 'b'). ValueError for what no browser would send."""
    if isinstance(value, str):
        value = [part for part in (part.strip() for part in value.split(",")) if part]
    if not isinstance(value, list | tuple):
        return value
    for origin in value:
        if origin != ANY_ORIGIN and not _is_origin(str(origin)):
            raise ValueError(f"{str(origin)[:100]!r} {_FORM}")
    return tuple(value)


def _is_origin(text: str) -> bool:
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    port = int(match["port"] or 0)
    return port <= 65535 and (port == 0) is (match["port"] is None) and _fits(match["scheme"], port)


def _fits(scheme: str, port: int) -> bool:
    return scheme != "file" and _OWN_PORTS.get(scheme) != port
