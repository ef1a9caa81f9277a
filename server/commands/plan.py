"""`moestro plan`: what serving would take and give; server/plans has the words."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console

from moestro.engine import StartError, StoredWeights, card_of, plan_card, plan_model
from moestro.server.facts import Refused, Settings, parse_size
from moestro.server.plans import card_lines, card_object, cpu_lines, cpu_object

from .console import progress_view, set_up_logging


def run_plan(
    settings: Settings, disk_speed: str | None, link: str | None, trace: Path | None, as_json: bool
) -> None:
    """Prints the plan on stdout. Raises Refused where serving would be refused."""
    set_up_logging(Console(stderr=True))
    speed, link_speed = _speed("--disk-speed", disk_speed), _speed("--link", link)
    try:
        with _model(settings) as (folder, stored):
            config = replace(settings.to_engine_config(), model_path=folder)
            card = card_of(config)
            _check_flags(card is not None, link, trace)
            if card is not None:
                on_card = plan_card(config, card, link_speed, speed, stored)
                found, words = card_object(on_card), card_lines(on_card)
            else:
                forecast = plan_model(config, speed, trace, stored)
                found, words = cpu_object(forecast), cpu_lines(forecast)
    except StartError as error:
        raise Refused(str(error)) from error
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(words))


def _check_flags(on_card: bool, link: str | None, trace: Path | None) -> None:
    """Raises Refused for what would change nothing."""
    if link is not None and not on_card:
        raise Refused(
            "--link: it is into a card, and this plan is for the CPU; --device cuda"
            " --device-memory 12GiB plans for one"
        )
    if trace is not None and on_card:
        raise Refused("--trace: hit rates of a card are for uniform routing so far; leave it out")


@contextmanager
def _model(settings: Settings) -> Iterator[tuple[Path, StoredWeights | None]]:
    """Where the model's config is for as long as the block runs, and what else is known of it.

    Raises StartError.
    """
    name = settings.hub_name
    if name is not None:
        from moestro.server.hub import fetch_for_plan

        view = progress_view(Console(stderr=True))
        try:
            found = fetch_for_plan(name, view)
        finally:
            view.close()
        yield found.folder, StoredWeights(total_bytes=found.weight_bytes)
    elif settings.is_demo:
        with _demo(settings.cache_dir) as known:
            yield known
    else:
        yield settings.model_path, None


@contextmanager
def _demo(cache_dir: Path) -> Iterator[tuple[Path, StoredWeights | None]]:
    """Where it was fetched, else as it will be."""
    from moestro.factorize import find_demo, sketch_demo

    folder = find_demo(cache_dir)
    if folder is not None:
        yield folder, None
        return
    with TemporaryDirectory(prefix="moestro-demo-") as made:
        yield Path(made), sketch_demo(Path(made))


def _speed(flag: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        speed = parse_size(text.strip().removesuffix("/s"))
    except ValueError as error:
        raise Refused(f"{flag}: {error}, per second") from error
    if not isinstance(speed, int) or speed <= 0:
        raise Refused(f"{flag}: {text!r} is not above 0")
    return speed
