"""Control groups: the folders in which limits of this process stand. Knows no limit itself."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def control_groups(controller: str, root: Path) -> Iterator[tuple[str, Path]]:
    """The process's own group and those above it up to the mounts' tops, of "v1" and of "v2".

    A limit may sit on any of them. `root` is where proc and sys are. A folder need not be there.
    """
    mounts = root / "sys/fs/cgroup"
    for mount, own in _own_groups(controller, root):
        version = "v1" if mount else "v2"
        tops = [mounts / name for name in mount] or [mounts, mounts / "unified"]
        # In a container the path can be the host's, which is not mounted: then the top is left.
        inside = own.relative_to("/") if own.is_absolute() and ".." not in own.parts else None
        for top in tops:
            for group in (inside, *inside.parents) if inside else (PurePosixPath(),):
                yield version, top / group


def _own_groups(controller: str, root: Path) -> list[tuple[tuple[str, ...], PurePosixPath]]:
    """Names under which version 1 is mounted (none: version 2), and the group there.

    Lines are number:controllers:path; version 2 is number 0 and names no controller.
    """
    found: list[tuple[tuple[str, ...], PurePosixPath]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            # "cpu,cpuacct" is one mount, and "cpu" in most systems a link to it.
            found.append((tuple(dict.fromkeys((controller, controllers))), PurePosixPath(path)))
        elif number == "0" and not controllers:
            found.append(((), PurePosixPath(path)))
    # Without proc, the tops at least.
    return found or [((controller,), PurePosixPath("/")), ((), PurePosixPath("/"))]
