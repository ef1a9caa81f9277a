"""Reads a `moestro serve …` command as the real command line would, without serving."""

from collections.abc import Sequence

from typer.main import get_group

from moestro.server.commands.cli import app
from moestro.server.facts.settings import Settings, load_settings


def parse_serve(arguments: Sequence[str]) -> Settings:
    """`arguments` follow `moestro`. Raises what the command line raises for a wrong one."""
    group = get_group(app)
    assert arguments[0] == "serve"
    parent = group.make_context("moestro", list(arguments))
    serve = group.get_command(parent, "serve")
    assert serve is not None
    given = serve.make_context("serve", list(arguments[1:]), parent=parent).params
    del given["no_prefetch"], given["no_host_compute"]
    return load_settings({name: value for name, value in given.items() if value is not None})
