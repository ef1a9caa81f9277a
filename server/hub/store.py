"""The hub's cache on disk, as all its programs share it. Knows no network.

models--org--name/blobs/<hash>                     the files' bytes
                  snapshots/<commit>/<file name>   links to them
                  refs/<branch or tag>             the commit it was last seen at
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moestro.server.facts import HubName

from .choice import RepoFile
from .repository import HubRefused, Pause

MAIN = "main"
PARTIAL = ".moestro-partial"
_COMMIT = re.compile(r"[0-9a-f]{40}")
LOCK_NAME = "moestro.lock"
LOCK_S = 0.5  # between two looks at it


class Store:
    """One repository's place."""

    def __init__(self, cache_dir: Path, name: HubName) -> None:
        self._cache_dir = cache_dir
        self._revision = name.revision or MAIN
        self._folder_name = "--".join(("models", *name.repo_id.split("/")))
        self.folder = cache_dir / self._folder_name

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def blob(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / file.blob

    def partial(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / f"{file.blob}{PARTIAL}"

    def known_commit(self) -> str | None:
        """Of the revision, as it was when it was fetched."""
        if _COMMIT.fullmatch(self._revision):
            return self._revision
        ref = self.folder / "refs" / self._revision
        try:
            found = ref.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return found if _COMMIT.fullmatch(found) else None

    def has(self, file: RepoFile, commit: str) -> bool:
        """A snapshot's file of another size is not the one that is listed."""
        path = self.snapshot(commit) / file.name
        return path.is_file() and path.stat().st_size == file.size_bytes

    def has_blob(self, file: RepoFile) -> bool:
        path = self.blob(file)
        return path.is_file() and path.stat().st_size == file.size_bytes

    def missing(self, files: Iterable[RepoFile], commit: str) -> list[RepoFile]:
        return [f for f in files if not self.has(f, commit) and not self.has_blob(f)]

    def partial_bytes(self, files: Iterable[RepoFile]) -> int:
        paths = [self.partial(file) for file in files]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def link(self, files: Sequence[RepoFile], commit: str) -> None:
        """Into the snapshot, by the names of the repository."""
        for file in files:
            if self.has(file, commit):
                continue
            place = self.snapshot(commit) / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            aside = place.with_name(f".{place.name}.{os.getpid()}")
            aside.unlink(missing_ok=True)
            aside.symlink_to(os.path.relpath(self.blob(file), place.parent))
            aside.replace(place)

    def remember(self, commit: str, *, first_only: bool) -> None:
        """That the revision is `commit`; `first_only`: unless another is known to be."""
        known = self.known_commit()
        if known == commit or (first_only and known is not None):
            return
        ref = self.folder / "refs" / self._revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        aside = ref.with_name(f".{ref.name}.{os.getpid()}")
        aside.write_text(commit, "utf-8")
        aside.replace(ref)

    @contextmanager
    def alone(self, pause: Pause) -> Iterator[None]:
        """Two starts at once share the download: the second finds here what the first fetched."""
        path = self._cache_dir / ".locks" / self._folder_name / LOCK_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            while not _locked(file.fileno()):
                pause(LOCK_S)
            yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free_bytes(folder: Path) -> int:
    """Where `folder` is, or will be made."""
    return shutil.disk_usage(_nearest(folder)).free


def device_of(folder: Path) -> int:
    """The same number for folders of one file system."""
    return _nearest(folder).stat().st_dev


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HubRefused(
            f"{error.filename or folder}: {error.strerror or error}; HF_HOME says where models of"
            " the hub are kept"
        ) from error
