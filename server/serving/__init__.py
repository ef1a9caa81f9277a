"""The application on its socket, from the first request to the last."""

from .lifecycle import Lifecycle

__all__ = ["Lifecycle"]
