"""Where the benchmark's large files lie, what they need, and that they go away again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .geometry import Geometry

MARGIN_BYTES = 2 << 30
# What lies there at once, in bytes per weight: the checkpoint, the int8 pack, Q8_0, Q4_0 …
RESIDENT_BARS = 2 + 1 + 34 / 32 + 18 / 32
# … and the int4 pack, the skewed variant's packs and Q4_0, a native pack or an offload folder.
DISK_BARS = RESIDENT_BARS + 0.55 + 1.55 + 18 / 32 + 2
GIB = 1 << 30


class NoRoom(Exception):
    """The disk is too small; the message says by how much and what to do."""


def needed_bytes(shape: Geometry, *, disk_bars: bool = True) -> int:
    """Free disk that a run takes at its fullest; less without the bars that are about disks."""
    return int(shape.numbers * (DISK_BARS if disk_bars else RESIDENT_BARS)) + MARGIN_BYTES


def free_bytes(folder: Path) -> int:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    state = os.statvfs(there)
    return state.f_bavail * state.f_frsize


@dataclass(slots=True)
class Workshop:
    """A folder for one run. What it made is removed at its end; what it found is left."""

    folder: Path
    keep: bool = False
    _made: list[Path] = field(default_factory=list)

    def path(self, name: str) -> Path:
        """A place for `name`, remembered for removal unless it lies there already."""
        path = self.folder / name
        if not path.exists() and path not in self._made:
            self._made.append(path)
        return path

    def drop(self, path: Path) -> None:
        """Remove something large as soon as it is not needed, if this run made it."""
        if path in self._made and not self.keep:
            remove(path)
            self._made.remove(path)

    def clean(self) -> None:
        for path in reversed(self._made):
            if not self.keep:
                remove(path)
        self._made.clear()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


@contextmanager
def workshop(folder: Path, wanted_bytes: int, keep: bool = False) -> Iterator[Workshop]:
    """Raises NoRoom before anything is written. Cleans up on every way out, Ctrl-C included."""
    present = sum(file.stat().st_size for file in folder.rglob("*.*") if file.is_file())
    free = free_bytes(folder)
    if free + present < wanted_bytes:
        raise NoRoom(
            f"this needs {wanted_bytes / GIB:.0f} GiB in {folder}, and {free / GIB:.0f} GiB are"
            " free: make room, or choose another place with MOESTRO_BENCH_DIR"
        )
    folder.mkdir(parents=True, exist_ok=True)
    place = Workshop(folder, keep)
    try:
        yield place
    finally:
        place.clean()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
