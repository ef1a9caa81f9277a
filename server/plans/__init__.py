"""What `moestro plan` says: of this machine's CPU, and of a GPU."""

from .card import card_lines, card_object
from .cpu import cpu_lines, cpu_object

__all__ = ["card_lines", "card_object", "cpu_lines", "cpu_object"]
