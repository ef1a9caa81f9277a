"""From a hub name to a folder that can be served, or planned with: only what is needed of it."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from moestro.engine import Progress, ProgressFn
from moestro.server.facts import HubName

from .choice import (
    CONFIG_NAME,
    INDEX_NAME,
    ROUTERS_NAME,
    SINGLE_NAME,
    NotServable,
    RepoFile,
    for_shapes,
    for_text,
    for_weights,
    total_bytes,
)
from .repository import Hub, HubRefused, Listing, Pause, Unreachable, list_repository, sleeping
from .store import Store, device_of, disk_errors, free_bytes
from .transfer import fetch_file

log = logging.getLogger("moestro.server")

MIB, GIB = 1 << 20, 1 << 30
DOWNLOAD = "download"

FreeBytes = Callable[[Path], int]
Check = Callable[[Path], None]  # of a folder with config, index and no weights


@dataclass(frozen=True, slots=True)
class PlanFolder:
    """`weight_bytes`: of all weights, where there is no index that says so; else None."""

    folder: Path
    weight_bytes: int | None


class _Shown:
    """Progress that can be shown again, for whoever may want to stop meanwhile."""

    def __init__(self, progress: ProgressFn) -> None:
        self._progress = progress
        self._last = Progress(DOWNLOAD, 0, 0, "bytes")

    def __call__(self, notice: Progress) -> None:
        self._last = notice
        self._progress(notice)

    def again(self) -> None:
        self._progress(self._last)


@dataclass(frozen=True, slots=True)
class _Fetching:
    """One repository at one commit, on its way into the cache."""

    hub: Hub
    name: HubName
    store: Store
    listing: Listing
    progress: _Shown
    pause: Pause

    @property
    def folder(self) -> Path:
        return self.store.snapshot(self.listing.commit)

    def bring(self, files: Sequence[RepoFile]) -> None:
        """Afterwards all of them are in `folder`. Raises HubRefused, Unreachable."""
        commit = self.listing.commit
        missing = self.store.missing(files, commit)
        if missing:
            with self.store.alone(self.pause):
                missing = self.store.missing(files, commit)  # another start may have fetched some
                self._download(missing)
        self.store.link(files, commit)

    def bring_few(self, files: Sequence[RepoFile]) -> None:
        """The same without a bar: one for a few small files would be the last that a log shows."""
        replace(self, progress=_Shown(lambda _: self.progress.again())).bring(files)

    def _download(self, missing: Sequence[RepoFile]) -> None:
        total, before = total_bytes(missing), 0
        for file in missing:

            def grown(here_bytes: int, before: int = before) -> None:
                self.progress(Progress(DOWNLOAD, before + here_bytes, total, "bytes"))

            grown(0)
            paths = (self.store.partial(file), self.store.blob(file))
            commit = self.listing.commit
            fetch_file(self.hub, self.name, commit, file, paths, grown, self.pause)
            before += file.size_bytes
        self.progress(Progress(DOWNLOAD, total, total, "bytes"))

    def shards(self) -> set[str] | None:
        """That the index names, which is fetched for it; None where the repository has none."""
        index = [file for file in self.listing.files if file.name == INDEX_NAME]
        if not index:
            return None
        self.bring_few(index)
        return _shards_of(self.folder)


def fetch_model(
    name: HubName,
    progress: ProgressFn,
    hub: Hub | None = None,
    *,
    check: Check | None = None,
    pack_dir: Path | None = None,
    pause: Pause | None = None,
    free: FreeBytes = free_bytes,
) -> Path:
    """The snapshot's folder with all that serving needs, each file with the hash that is listed.

    What is cached is not fetched again; without a connection a whole snapshot in the cache is
    served as it is. `progress` may raise to stop it; what has arrived stays, and the next start
    goes on from there. Raises HubRefused before anything large, where it does not fit on the disk;
    what `check` raises over the config ends it there, too;
    warns where it may not fit into `pack_dir` once more, as a pack.
    """
    hub = hub or Hub.of_environment()
    store = Store(hub.cache_dir, name)
    with disk_errors(hub.cache_dir):
        try:
            fetching = _listed(hub, name, store, progress, pause)
        except Unreachable as error:
            return _cached(name, store, error, for_plan=False).folder
        listed = fetching.listing.files
        with _servable(name):
            shapes, weights = for_shapes(listed), for_weights(listed, fetching.shards())
        files = [*shapes, *for_text(listed), *weights]
        if check is not None and store.missing(weights, fetching.listing.commit):
            fetching.bring_few(shapes)
            check(fetching.folder)
        to_come_bytes = _require_room(fetching, files, free)
        if pack_dir is not None and to_come_bytes:
            _warn_of_pack(total_bytes(weights), to_come_bytes, (store.folder, pack_dir), free)
        fetching.bring(files)
        with suppress(PermissionError):  # a cache that is only read
            store.remember(fetching.listing.commit, first_only=False)
    return fetching.folder


def fetch_for_plan(
    name: HubName, progress: ProgressFn, hub: Hub | None = None, *, pause: Pause | None = None
) -> PlanFolder:
    """The snapshot's folder with its config and index alone. Otherwise like `fetch_model`."""
    hub = hub or Hub.of_environment()
    store = Store(hub.cache_dir, name)
    with disk_errors(hub.cache_dir):
        try:
            fetching = _listed(hub, name, store, progress, pause)
        except Unreachable as error:
            return _cached(name, store, error, for_plan=True)
        listed = fetching.listing.files
        with _servable(name):
            shards = fetching.shards()
            weights = for_weights(listed, shards)
            fetching.bring(for_shapes(listed))
        with suppress(PermissionError):
            store.remember(fetching.listing.commit, first_only=True)
    return PlanFolder(fetching.folder, total_bytes(weights) if shards is None else None)


@contextmanager
def _servable(name: HubName) -> Iterator[None]:
    try:
        yield
    except NotServable as error:
        raise HubRefused(f"{name} is no model that moestro serves: {error}") from error


def _listed(
    hub: Hub, name: HubName, store: Store, progress: ProgressFn, pause: Pause | None
) -> _Fetching:
    shown = _Shown(progress)
    patience = sleeping(shown.again) if pause is None else pause
    return _Fetching(hub, name, store, list_repository(hub, name, patience), shown, patience)


def _require_room(fetching: _Fetching, files: Sequence[RepoFile], free: FreeBytes) -> int:
    """Bytes to download, which it says; raises HubRefused where the disk has no room for them."""
    store, commit = fetching.store, fetching.listing.commit
    missing = store.missing(files, commit)
    what = f"{fetching.name} ({commit[:12]}): {len(files)} files of {_size(total_bytes(files))}"
    if not missing:
        log.info("%s, all of them in %s", what, store.folder)
        return 0
    begun_bytes = store.partial_bytes(missing)
    wanted_bytes = total_bytes(missing) - begun_bytes
    room_bytes = free(store.folder)
    begun = f" ({_size(begun_bytes)} more are here of an earlier start)" if begun_bytes else ""
    log.info(
        "%s, %d of them (%s) to download%s into %s, where %s are free",
        *(what, len(missing), _size(wanted_bytes), begun, store.folder, _size(room_bytes)),
    )
    if wanted_bytes > room_bytes:
        raise HubRefused(
            f"{fetching.name} needs {_size(wanted_bytes)} more for its download and"
            f" {store.folder} has {_size(room_bytes)} free; make room, or set HF_HOME to a folder"
            " on a larger disk"
        )
    return wanted_bytes


def _warn_of_pack(
    weight_bytes: int, to_come_bytes: int, folders: tuple[Path, Path], free: FreeBytes
) -> None:
    """No pack is larger than all weights; how much smaller it is, the start will know."""
    downloads, packs = folders
    shared = device_of(downloads) == device_of(packs)
    left_bytes = free(packs) - (to_come_bytes if shared else 0)
    if weight_bytes > left_bytes:
        log.warning(
            "after the download %s are free in %s, and the pack of its experts takes up to %s;"
            " `moestro plan` says what a smaller --expert-format takes, --cache-dir is where"
            " packs go",
            *(_size(left_bytes), packs, _size(weight_bytes)),
        )


def _cached(name: HubName, store: Store, cause: Unreachable, *, for_plan: bool) -> PlanFolder:
    """What is in the cache, if it is whole. Raises Unreachable with what it lacks."""
    commit = store.known_commit()
    folder = None if commit is None else store.snapshot(commit)
    if folder is None or not folder.is_dir():
        raise Unreachable(f"{name} is not in {store.folder.parent}, and {cause}") from cause
    lacks = None if (folder / CONFIG_NAME).is_file() else CONFIG_NAME
    if lacks is None and not for_plan:
        lacks = _lacking(folder)
    if lacks is not None:
        raise Unreachable(f"{folder} lacks {lacks}, and {cause}") from cause
    log.warning("%s: %s; taken as it is in the cache (%s)", name, cause, folder.name[:12])
    return PlanFolder(folder, None)


def _lacking(folder: Path) -> str | None:
    """The first file of its weights that is not in `folder`."""
    if (folder / INDEX_NAME).is_file():
        lost = sorted(n for n in _shards_of(folder) if not (folder / n).is_file())
        return lost[0] if lost else None
    weights = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
    return None if [name for name in weights if name != ROUTERS_NAME] else SINGLE_NAME


def _shards_of(folder: Path) -> set[str]:
    path = folder / INDEX_NAME
    try:
        names = set(json.loads(path.read_text("utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise HubRefused(f"{path} is not a weight index: it has no weight_map") from error
    if not names or not all(isinstance(n, str) and n and n == Path(n).name for n in names):
        raise HubRefused(f"{path} is not a weight index: weight_map names no files")
    return names


def _size(count_bytes: int) -> str:
    return f"{count_bytes / GIB:.2f} GiB" if count_bytes >= GIB else f"{count_bytes / MIB:.1f} MiB"
