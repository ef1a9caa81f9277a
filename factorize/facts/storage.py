"""Folders that appear whole or not at all, and the lock that lets two starts share one of them.

Knows nothing about models.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moestro.engine import Progress, ProgressFn

from .errors import FactorizeError

STAGING_PREFIX = ".staging-"
LOCK_POLL_S = 0.2

FreeBytes = Callable[[Path], int]


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def require_free(folder: Path, needed_bytes: int, what: str, free: FreeBytes = free_bytes) -> None:
    """Raises FactorizeError, with the sums, when `folder` has less than `needed_bytes` left."""
    left_bytes = free(folder)
    if left_bytes < needed_bytes:
        raise FactorizeError(
            f"{what} needs {needed_bytes / 1e6:.0f} MB of free disk in {folder}, which has "
            f"{left_bytes / 1e6:.0f} MB; free some or choose another folder"
        )


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder inside `parent` that is gone when the block ends, however it ends."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; when the block succeeds it becomes `target`.

    An older `target` is replaced. When the block raises, nothing is left and `target` is as before.
    """
    with scratch(target.parent) as aside:
        new = aside / "new"
        new.mkdir()
        yield new
        for path in sorted(new.rglob("*")):
            sync(path)
        sync(new)
        if target.exists():
            target.rename(aside / "old")
        new.rename(target)
        sync(target.parent)


def sweep(parent: Path) -> None:
    """Removes what a killed process left in `parent`. Call under the lock only."""
    for folder in parent.glob(STAGING_PREFIX + "*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def exclusive(lock: Path, progress: ProgressFn) -> Iterator[None]:
    """One process at a time inside; the others wait and say so through `progress`."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        while not _try_lock(file.fileno()):
            progress(Progress("waiting for another start", 0, 0))
            time.sleep(LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    # the kernel drops the lock with the file, so a killed process never blocks the next one
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a FactorizeError that names `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FactorizeError(f"could not write into {folder}: {error}") from error
