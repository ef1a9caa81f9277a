"""From what was said on the command line to settings."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from moestro.server.facts import Places, Settings


def said(parameters: dict[str, Any], *others: str) -> dict[str, Any]:
    """Those of a command's parameters that are settings and were said."""
    return {name: v for name, v in parameters.items() if v is not None and name not in others}


def settings_of(given: dict[str, Any]) -> "Settings":
    """Raises Refused. A variable that is no setting changes nothing, and is said."""
    from moestro.server.facts import load_settings

    _say_misspelt()
    return load_settings(given)


def places_of(cache_dir: str | None) -> "Places":
    """Raises Refused."""
    from moestro.server.facts import load_places

    _say_misspelt()
    return load_places(cache_dir)


def _say_misspelt() -> None:
    from moestro.server.facts import misspelt_variables

    for line in misspelt_variables():
        typer.echo(f"moestro: warning: {line}", err=True)
