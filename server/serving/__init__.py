"""The application on its socket, from the first request to the last."""

from .lifecycle import Lifecycle
from .listen import is_loopback, listening_socket, url_of

__all__ = ["Lifecycle", "is_loopback", "listening_socket", "url_of"]
