"""`moestro models`: what lies in the caches, and whether it would be served as it stands.

The engine is imported where it is asked for: the command line starts without torch.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer import Option

from moestro.server.facts import Refused, size_words

from . import flags
from .parameters import places_of

if TYPE_CHECKING:
    from moestro.engine import FetchedModel, KeptModel
    from moestro.server.hub import FetchedRepository

models_app = typer.Typer(
    rich_markup_mode=None,
    help="What the cache folder keeps (packs of experts, dense weights, fetched models), and what"
    " was fetched into the hub's cache.",
)

Names = Annotated[
    list[str], typer.Argument(metavar="NAME…", help="As `moestro models` prints them.")
]


@models_app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    cache_dir: flags.CacheDir = None,
    as_json: Annotated[bool, Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """List what the cache folder keeps and what moestro fetched into the hub's: size, family, lane,

    source, last use, and the verdict of `moestro plan` on serving it now.

    \b
    Examples:
      moestro models
      moestro models rm SmolLM2-135M-Instruct-MoE-d102a968
      moestro models rm org/name        (its download, and not the packs made of it)
    """
    if context.invoked_subcommand is not None:
        return
    places = places_of(cache_dir)
    run_models(places.cache_dir, as_json)


@models_app.command()
def rm(names: Names, cache_dir: flags.CacheDir = None) -> None:
    """Free what is kept under these names; never what a server uses at the moment.

    \b
    A checkpoint of your own is not touched: only the packs and dense weights that were made of it,
    which the next start makes again. The demo's own models are fetched again.
    """
    places = places_of(cache_dir)
    run_remove(names, places.cache_dir)


NOTHING = (
    "nothing is kept in {cache_dir} yet: every start of `moestro serve` leaves its packs there"
)
GONE = "its files are not there any more: the packs can go"


def run_models(cache_dir: Path, as_json: bool) -> None:
    """Prints a line for each model on stdout, or one JSON list."""
    from moestro.engine import fetched_models, kept_models

    from .console import set_up_logging

    set_up_logging(Console(stderr=True, quiet=True))
    kept, fetched = kept_models(cache_dir), fetched_models(cache_dir)
    rows = [_hub_row(each, kept, cache_dir) for each in _repositories()]
    rows += [_fetched_row(each) for each in fetched]
    rows += [_kept_row(each, cache_dir) for each in kept]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo(NOTHING.format(cache_dir=cache_dir))
        return
    for row in rows:
        typer.echo(_text(row))
    total = sum(row["size_bytes"] for row in rows)
    typer.echo(f"{size_words(total)} in all; `moestro models rm NAME` frees one")


def _hub_cache() -> Path:
    """As the hub's library has read it (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repositories() -> "list[FetchedRepository]":
    from moestro.server.hub import fetched_repositories

    return fetched_repositories(_hub_cache())


def _in_use(found: "FetchedRepository", kept: "list[KeptModel]") -> bool:
    """Served out of right now."""
    return any(
        each.in_use and each.model_path is not None and found.holds(each.model_path)
        for each in kept
    )


def _hub_row(
    found: "FetchedRepository", kept: "list[KeptModel]", cache_dir: Path
) -> dict[str, Any]:
    from moestro.engine import EngineConfig, family_of, verdict

    newest = next(iter(found.snapshots), None)
    return {
        "name": str(found.name),
        "kind": "hub",
        "formats": [],
        "size_bytes": found.size_bytes,
        "family": "" if newest is None else family_of(newest),
        "lane": "",
        "source": str(found.folder),
        "last_used_s": int(found.last_used_s),
        "in_use": _in_use(found, kept),
        "verdict": "a download that was cut; the next start goes on with it"
        if newest is None
        else verdict(EngineConfig(newest, cache_dir)),
    }


def _kept_row(kept: "KeptModel", cache_dir: Path) -> dict[str, Any]:
    return {
        "name": kept.name,
        "kind": "packs",
        "formats": list(kept.formats),
        "size_bytes": kept.size_bytes,
        "family": kept.family,
        "lane": kept.lane,
        "source": "" if kept.model_path is None else str(kept.model_path),
        "last_used_s": int(kept.last_used_s),
        "in_use": kept.in_use,
        "verdict": _verdict(kept, cache_dir),
    }


def _fetched_row(fetched: "FetchedModel") -> dict[str, Any]:
    return {
        "name": fetched.name,
        "kind": "model",
        "formats": [],
        "size_bytes": fetched.size_bytes,
        "family": fetched.family,
        "lane": "",
        "source": str(fetched.folder),
        "last_used_s": int(fetched.last_changed_s),
        "in_use": False,
        "verdict": "",
    }


def _verdict(kept: "KeptModel", cache_dir: Path) -> str:
    """Of a start with the first format that is kept."""
    if kept.model_path is None:
        return "made by an older version, which left no note of its model"
    if not kept.model_path.exists():
        return GONE
    from moestro.engine import EngineConfig, verdict

    name = (kept.formats or ("native",))[0]
    expert_format = "native" if name.startswith("mixed") else name
    return verdict(EngineConfig(kept.model_path, cache_dir, expert_format=expert_format))


def _text(row: dict[str, Any]) -> str:
    facts = [row["family"] or "unknown family", size_words(row["size_bytes"])]
    facts += [f"lane {row['lane']}"] if row["lane"] else []
    facts += [f"experts in {', '.join(row['formats'])}"] if row["formats"] else []
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["last_used_s"]))
    facts.append("in use" if row["in_use"] else f"last used {used}")
    lines = [f"{row['name']} ({row['kind']}): {', '.join(facts)}"]
    lines += [f"    of {row['source']}"] if row["source"] else []
    lines += [f"    {row['verdict']}"] if row["verdict"] else []
    return "\n".join(lines)


def run_remove(names: list[str], cache_dir: Path) -> None:
    """Frees what `names` name, all or, where one is not there or in use, nothing more.

    Raises Refused.
    """
    from moestro.engine import (
        KeptModel,
        StartError,
        fetched_models,
        kept_models,
        remove,
        remove_fetched,
    )
    from moestro.server.hub import FetchedRepository, remove_repository

    kept, fetched = kept_models(cache_dir), fetched_models(cache_dir)
    fetched_names = {str(each.name): each for each in _repositories()}
    known: dict[str, KeptModel | FetchedModel | FetchedRepository] = {**fetched_names}
    known |= {each.name: each for each in fetched}
    known |= {each.name: each for each in kept}
    used = {each.name for each in kept if each.in_use}
    used |= {name for name, each in fetched_names.items() if _in_use(each, kept)}
    for name in names:
        if name not in known:
            there = ", ".join(known) or "nothing"
            raise Refused(f"NAME: nothing called {name!r} is kept in {cache_dir}; there is {there}")
        if name in used:
            raise Refused(f"NAME: {name} is in use: stop the server that serves it first")
    for name in dict.fromkeys(names):
        chosen = known[name]
        try:
            if isinstance(chosen, KeptModel):
                freed = remove(chosen)
            elif isinstance(chosen, FetchedRepository):
                freed = remove_repository(_hub_cache(), chosen, time.sleep)
            else:
                freed = remove_fetched(chosen, kept)
        except (StartError, OSError) as error:
            raise Refused(f"NAME: {error}") from error
        typer.echo(f"{name}: {size_words(freed)} freed")
