"""Folders that appear whole or not at all, and the lock that lets two starts share one of them.

Knows nothing about models.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from moestro.cache import wait_for_lock
from moestro.engine import Progress, ProgressFn

from .errors import FactorizeError

STAGING_PREFIX = ".staging-"
PUBLISH_ATTEMPTS = 3

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
def exclusive(lock: Path, progress: ProgressFn) -> Iterator[bool]:
    """One process at a time inside; the others wait and say so through `progress`.

    False, and nobody waits, where the file system has no locks.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        # the kernel drops the lock with the file, so a killed process never blocks the next one
        yield wait_for_lock(
            file.fileno(), lock, lambda: progress(Progress("waiting for another start", 0, 0))
        )


def publish(new: Path, target: Path, is_whole: Callable[[Path], bool]) -> None:
    """`new` becomes `target`, unless another process has made a whole one meanwhile.

    For where no lock keeps two from publishing at once. `new` and `target` share a file system.
    """
    for attempt in range(PUBLISH_ATTEMPTS):
        if is_whole(target):
            return
        with suppress(FileNotFoundError):
            target.rename(new.with_name(f"{new.name}-old-{attempt}"))
        try:
            new.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
    raise FactorizeError(f"another start writes {target} again and again; start one at a time")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a FactorizeError that names `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FactorizeError(f"could not write into {folder}: {error}") from error
