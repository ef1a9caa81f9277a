"""What the cache folder keeps of each model that was started: packs, dense weights, a note.

    packs/NAME-PLACE/      one folder for each model's folder: NAME, and eight digits of its path
        model.json         the note: path, family, lane; its time is that of the last start
        products.json      which of two products is faster on this processor (engine/kernels)
        in-use.lock        locked, shared, by every process that serves out of the folder

A file system without locks keeps nobody from removing what another process uses; on Linux files
that are open stay readable until they are closed.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moestro.engine.facts import EngineConfig, StartError

NOTE_NAME, LOCK_NAME = "model.json", "in-use.lock"
PACKS, MODELS = "packs", "models"


class InUse(StartError):
    """Somebody serves out of the folder."""


@dataclass(frozen=True, slots=True)
class KeptModel:
    """One folder below `packs`."""

    folder: Path
    model_path: Path | None  # None: an older version made it, which left no note
    family: str  # "" without a note
    lane: str
    size_bytes: int
    formats: tuple[str, ...]  # of the packs that are whole
    last_used_s: float  # unix time of the last start, or of the newest file
    in_use: bool

    @property
    def name(self) -> str:
        """What `remove` takes."""
        return self.folder.name


class FolderLock:
    """Held, shared, while a process serves out of the folder."""

    def __init__(self, folder: Path) -> None:
        """Makes `folder`. Waits for a removal of it that is under way. Raises OSError."""
        self._fd = -1
        while self._fd < 0:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / LOCK_NAME
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(fd, fcntl.LOCK_SH)
            if _is_at(fd, path):
                self._fd = fd
            else:  # removed meanwhile, and the lock with it
                os.close(fd)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def use_folder(config: EngineConfig, family: str, lane: str) -> FolderLock:
    """Locks the model's folder of packs and leaves its note. Raises StartError."""
    folder = config.pack_path.parent
    try:
        lock = FolderLock(folder)
        note = {"model": str(config.model_path.resolve()), "family": family, "lane": lane}
        aside = folder / f"{NOTE_NAME}.{os.getpid()}"
        aside.write_text(json.dumps(note) + "\n", "utf-8")
        aside.replace(folder / NOTE_NAME)
    except OSError as error:
        raise StartError(f"--cache-dir {config.cache_dir}: {error.strerror}") from error
    return lock


def kept_models(cache_dir: Path) -> list[KeptModel]:
    """By name. What disappears meanwhile is left out."""
    packs = cache_dir / PACKS
    folders = sorted(packs.iterdir()) if packs.is_dir() else []
    return [_kept(folder) for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _kept(folder: Path) -> KeptModel:
    note = _note(folder)
    files = list(_files(folder))
    times = [modified_s for _, _, modified_s in files]
    noted = folder / NOTE_NAME
    return KeptModel(
        folder=folder,
        model_path=Path(note["model"]) if "model" in note else None,
        family=note.get("family", ""),
        lane=note.get("lane", ""),
        size_bytes=sum(size_bytes for _, size_bytes, _ in files),
        formats=tuple(sorted(path.stem for path, _, _ in files if path.suffix == ".pack")),
        last_used_s=noted.stat().st_mtime if note else max(times, default=0.0),
        in_use=_is_in_use(folder / LOCK_NAME),
    )


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """(path, bytes that it takes on the disk, time of the last change)."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            stat = path.lstat()
            yield path, stat.st_blocks * 512, stat.st_mtime


def _note(folder: Path) -> dict[str, str]:
    """Empty where there is none that is readable."""
    try:
        found = json.loads((folder / NOTE_NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    texts = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if texts else {}


def _is_in_use(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks here: nobody can say
    finally:
        os.close(fd)
    return False


def remove(kept: KeptModel) -> int:
    """Frees the folder; the bytes that it took. Raises InUse, StartError where the disk refuses."""
    try:
        fd = os.open(kept.folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(kept.folder)
        finally:
            os.close(fd)
    except BlockingIOError as error:
        raise InUse(f"{kept.name} is in use: stop the server that serves it first") from error
    except OSError as error:
        raise StartError(f"{kept.folder}: {error.strerror}") from error
    return kept.size_bytes


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model's own files, below `models`: the demo's, and what it is made of."""

    folder: Path
    family: str  # "" where its config does not tell
    size_bytes: int
    last_changed_s: float

    @property
    def name(self) -> str:
        return self.folder.name


def fetched_models(cache_dir: Path) -> list[FetchedModel]:
    """By name."""
    models = cache_dir / MODELS
    folders = sorted(models.iterdir()) if models.is_dir() else []
    return [
        FetchedModel(
            folder,
            family_of(folder),
            sum(size_bytes for _, size_bytes, _ in _files(folder)),
            folder.stat().st_mtime,
        )
        for folder in folders
        if folder.is_dir() and not folder.name.startswith(".")
    ]


def family_of(folder: Path) -> str:
    """By its config; "" where that does not tell."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
        return str(found["model_type"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ""


def remove_fetched(fetched: FetchedModel, kept: list[KeptModel]) -> int:
    """Frees a model's own files. Raises InUse while one of `kept` serves it, StartError else."""
    for each in kept:
        if each.in_use and each.model_path == fetched.folder.resolve():
            raise InUse(f"{fetched.name} is in use: stop the server that serves it first")
    try:
        shutil.rmtree(fetched.folder)
    except OSError as error:
        raise StartError(f"{fetched.folder}: {error.strerror}") from error
    return fetched.size_bytes
