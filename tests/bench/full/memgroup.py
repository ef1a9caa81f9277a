"""A memory group of our own for one measured process, in either version; removed afterwards."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
LIMITS = {"memory": "memory.limit_in_bytes", ".": "memory.max"}
EMPTY_WITHIN_S = 20.0


class NoMemoryGroup(Exception):
    """This machine lets nobody here limit a process's memory; the message says what was tried."""


@contextmanager
def memory_group(limit_bytes: int, mount: Path = MOUNT) -> Iterator[Path]:
    """The folder of a new group with `limit_bytes`, page cache counted. Raises NoMemoryGroup."""
    group = _make(limit_bytes, mount)
    try:
        yield group
    finally:
        _remove(group)


def _make(limit_bytes: int, mount: Path) -> Path:
    tried = []
    for place, limit in LIMITS.items():
        group = mount / place / f"moestro-bench-{os.getpid()}"
        if place == "." and not (mount / "cgroup.controllers").exists():
            continue  # no second version here
        try:
            group.mkdir()
        except OSError as error:
            tried.append(f"{group}: {error.strerror}")
            continue
        try:
            (group / limit).write_text(str(limit_bytes))
        except OSError as error:
            tried.append(f"{group / limit}: {error.strerror}")
            group.rmdir()
            continue
        return group
    raise NoMemoryGroup("; ".join(tried) or f"no memory controller below {mount}")


def _remove(group: Path) -> None:
    """A group can be removed when its last process is gone, which takes a moment."""
    end = time.monotonic() + EMPTY_WITHIN_S
    while True:
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def forget_pages(*paths: Path) -> None:
    """Drop the files' page cache: pages read before would not count against a group."""
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)
