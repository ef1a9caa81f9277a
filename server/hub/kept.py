"""What moestro has fetched into the hub's cache, listed and freed; others' is left alone."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.server.facts import HubName

from .repository import Pause
from .store import LOCK_NAME, Store

_PREFIX = "models--"


@dataclass(frozen=True, slots=True)
class FetchedRepository:
    """One repository of which moestro has fetched something."""

    name: HubName
    folder: Path
    snapshots: tuple[Path, ...]  # the newest first
    size_bytes: int  # parts of a download that was cut included
    last_used_s: float  # unix time of the last look at it

    def holds(self, path: Path) -> bool:
        return self.folder.resolve() in path.resolve().parents


def fetched_repositories(hub_cache: Path) -> list[FetchedRepository]:
    """Those that the store's lock says it was in; by name."""
    found = (_repository(hub_cache, lock) for lock in hub_cache.glob(f".locks/*/{LOCK_NAME}"))
    return sorted((each for each in found if each is not None), key=lambda each: str(each.name))


def _repository(hub_cache: Path, lock: Path) -> FetchedRepository | None:
    folder = hub_cache / lock.parent.name
    parts = folder.name.removeprefix(_PREFIX).split("--")
    if len(parts) != 2 or not folder.is_dir():
        return None
    snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: -path.stat().st_mtime)
    return FetchedRepository(
        HubName("/".join(parts), None),
        folder,
        tuple(snapshots),
        sum(path.lstat().st_size for path in _files(folder)),
        lock.stat().st_mtime,
    )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def remove_repository(hub_cache: Path, found: FetchedRepository, pause: Pause) -> int:
    """Frees all of it, not while it is being fetched; how many bytes. Raises OSError."""
    with Store(hub_cache, found.name).alone(pause):
        size_bytes = sum(path.lstat().st_size for path in _files(found.folder))
        shutil.rmtree(found.folder)
        (hub_cache / ".locks" / found.folder.name / LOCK_NAME).unlink()
    return size_bytes
