"""The command line, one file per command."""

from .cli import main

__all__ = ["main"]
