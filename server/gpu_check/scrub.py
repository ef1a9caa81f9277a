"""What a user pastes into a bug report says nothing about whose machine it was."""

import re
import socket

_HOME = re.compile(r"(?<![\w.:/])/(?:home|Users)/[^/\s\"'<>|,;:)]+")
# An absolute path of two parts or more: its last part stays.
_PATH = re.compile(r"(?<![\w.:/~])~?/(?:[^/\s\"'<>|]+/)+([^/\s\"'<>|,;:)]*)")
_LEAST_HOST_CHARS = 3  # a shorter name would be found inside of words


def scrubbed(text: str) -> str:
    """Folders of paths and the host's name left out."""
    found = _PATH.sub(r"…/\1", _HOME.sub("~", text))
    host = socket.gethostname()
    if len(host) < _LEAST_HOST_CHARS:
        return found
    return re.sub(rf"\b{re.escape(host)}\b", "HOST", found)
