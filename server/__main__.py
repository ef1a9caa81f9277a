"""`python -m moestro.server` is the `moestro` command."""

from moestro.server.commands import main

main()
