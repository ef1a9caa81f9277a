"""`python -m moestro.server` is the `moestro` command."""

from .entry import main

main()
