"""Where the benchmark's large files lie, what they need, and that they go away again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .geometry import BF16_BYTES, Geometry

MARGIN_BYTES = 128 << 20
Q8_0_WIDTH = 34 / 32  # bytes per weight
PACK_SLACK = 1.04  # scales, alignment, and the dense part in its second digit
GIB = 1 << 30


class NoRoom(Exception):
    """The disk is too small; the message says by how much and what to do."""


def needed_bytes(shape: Geometry, *, disk_bars: bool = True) -> int:
    """Free disk that a run takes at its fullest, one format at a time (see `Bench.only`).

    The checkpoint, and beside it an int8 pack with Q8_0; or, for the bars that are about disks,
    a second dense part (the skewed variant's) with a native pack or stock's offload folder.
    """
    beside = shape.numbers * (Q8_0_WIDTH + PACK_SLACK)
    if disk_bars:
        experts = shape.layers * shape.experts * shape.expert_numbers
        second_dense = BF16_BYTES * (shape.numbers - experts)
        beside = max(beside, second_dense + PACK_SLACK * BF16_BYTES * experts)
    return shape.checkpoint_bytes + int(beside) + MARGIN_BYTES


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

    def made(self, *patterns: str) -> list[Path]:
        """What this run made, or may make again, by the pattern of its name."""
        return [path for path in self._made if any(path.match(each) for each in patterns)]

    def drop(self, path: Path) -> None:
        """Remove something large as soon as it is not needed, if this run made it.

        It stays this run's own: made again, it is removed again.
        """
        if path in self._made and not self.keep:
            remove(path)

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
