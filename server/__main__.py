"""`python -m moestro.server` is the `moestro` command."""

from .cli import main

main()
