"""How much memory there is: what must not be exceeded, and what is available at this moment.

Limits are the machine's and the memory groups', and do not change from start to start. What is
available does: others hold memory, too. The page cache is available, files on tmpfs are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from moestro.engine.facts import StartError, control_groups

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What the host's budgets are settled with."""

    limit: tuple[int, str]  # bytes, and whose limit that is
    available_bytes: int | None = None  # to this process, what it has included; None: all of it


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """Names of one version of memory groups."""

    limits: tuple[str, ...]
    usage: str
    page_cache: tuple[str, ...]  # keys of memory.stat


_FILES = {
    "v1": _GroupFiles(
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
    # Above memory.high nothing is killed, but every allocation waits for memory to be reclaimed.
    "v2": _GroupFiles(
        ("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")
    ),
}


@contextmanager
def _readable_proc() -> Iterator[None]:
    """Raises StartError where the system says nothing about memory."""
    try:
        yield
    except OSError as error:
        raise StartError(
            f"cannot tell how much memory there is: {error.filename or '/proc'}:"
            f" {error.strerror}; mount /proc where moestro runs"
        ) from error


def resident_bytes() -> int:
    """Of this process, now. Raises StartError."""
    with _readable_proc():
        try:
            return int(psutil.Process().memory_info().rss)
        except psutil.Error as error:  # what psutil makes of a /proc that is not there
            raise FileNotFoundError(2, str(error), "/proc") from error


def memory_limit(root: Path = Path("/")) -> tuple[int, str]:
    """The tightest of the machine's memory and the memory groups' limits, with its name.

    A limit may sit on any ancestor of the process's own group, so all of them are asked. `root` is
    where proc and sys are. Raises StartError.
    """
    with _readable_proc():
        limit, name = psutil.virtual_memory().total, "the machine's memory"
    for folder, files in _groups(root):
        for path in (folder / name for name in files.limits):
            group = _number(path)
            if group is not None and group < limit:
                limit, name = group, f"the memory group's limit, {path}"
    return limit, name


def memory_available(root: Path = Path("/")) -> int:
    """Bytes that this process could take now, beyond those it has. Raises StartError."""
    with _readable_proc():
        available = psutil.virtual_memory().available
    for folder, files in _groups(root):
        limits = [_number(folder / name) for name in files.limits]
        limit = min((found for found in limits if found is not None), default=None)
        usage = _number(folder / files.usage)
        if limit is not None and usage is not None:
            page_cache = _page_cache_bytes(folder / "memory.stat", files.page_cache)
            available = min(available, limit - usage + page_cache)
    return max(0, available)


def is_in_memory(folder: Path, root: Path = Path("/")) -> bool:
    """Whether files in `folder` are memory: on tmpfs and the like. An unknown mount is not."""
    try:
        lines = (root / "proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    mounts = [line.split(" ") for line in lines]
    kinds = {_unescaped(fields[1]): fields[2] for fields in mounts if len(fields) > 2}
    place = folder.absolute()
    for candidate in (place, *place.parents):
        if str(candidate) in kinds:
            return kinds[str(candidate)] in MEMORY_FILE_SYSTEMS
    return False


def _unescaped(path: str) -> str:
    """Spaces and the like stand there as octal numbers."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, char)
    return path


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def _page_cache_bytes(path: Path, keys: tuple[str, ...]) -> int:
    try:
        pairs = dict(line.split(" ", 1) for line in path.read_text().splitlines())
        return sum(int(pairs.get(key, 0)) for key in keys)
    except (OSError, ValueError):
        return 0


def _groups(root: Path) -> Iterator[tuple[Path, _GroupFiles]]:
    for version, folder in control_groups("memory", root):
        yield folder, _FILES[version]
