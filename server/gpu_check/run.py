"""Runs the checks, and keeps what is known in two files after each of them."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from moestro.engine import Checked, Opener, Sizes, StartError, Status, check_gpu, load
from moestro.server.facts import Refused

from .report import INTERRUPTED, as_object, page, status

REPORT_NAME = "gpu-check.json"
DONE = (Status.PASSED, Status.FAILED, Status.INTERRUPTED)


def run_gpu_check(
    device: str,
    quick: bool,
    out: Path | None,
    cache_dir: Path,
    open_engine: Opener = load,
    sizes: Sizes | None = None,
) -> int:
    """0 where all that was run passed, 1 where something failed. `sizes` are for tests.

    Raises Refused where there is no GPU or a file cannot be written. Interrupted, it says what is
    kept and goes on being interrupted.
    """
    with _scratch(cache_dir) as scratch:
        report = _Report(out or _default_place(cache_dir))
        try:
            checked = check_gpu(device, scratch, open_engine, report, quick=quick, sizes=sizes)
        except StartError as error:
            raise Refused(str(error)) from error
        except (KeyboardInterrupt, SystemExit):
            report.interrupt()
            typer.echo(f"\ngpu-check: interrupted; {report.kept}", err=True)
            raise
    state = status(checked.outcomes)
    typer.echo(page(checked, state), nl=False)
    typer.echo(f"gpu-check: {report.kept}", err=True)
    return 1 if state == "failed" else 0


class _Report:
    """Both files, written anew each time, and lines of progress on stderr."""

    def __init__(self, path: Path) -> None:
        self._path, self._text_path = path, path.with_suffix(".txt")
        self._said = set[tuple[str, Status]]()
        self._began_s = time.monotonic()
        self._last: Checked | None = None  # that is in the files

    def __call__(self, checked: Checked) -> None:
        """Raises Refused where a file cannot be written."""
        self._say(checked)
        self._write(checked, status(checked.outcomes))

    def interrupt(self) -> None:
        """Whenever it was, the files say so. Raises Refused where they cannot be written."""
        if self._last is not None:
            self._write(self._last, INTERRUPTED)

    @property
    def kept(self) -> str:
        if self._last is None:
            return "nothing was written yet"
        return f"what was found is in {self._path} and {self._text_path}"

    def _write(self, checked: Checked, state: str) -> None:
        try:
            _replace(
                self._path, json.dumps(as_object(checked, state), indent=1, allow_nan=False) + "\n"
            )
            _replace(self._text_path, page(checked, state))
        except OSError as error:
            raise Refused(f"--out: cannot write {error.filename}: {error.strerror}") from error
        self._last = checked

    def _say(self, checked: Checked) -> None:
        now_s = time.monotonic() - self._began_s
        for outcome in checked.outcomes:
            event = outcome.name, outcome.status
            if outcome.status is Status.WAITING or event in self._said:
                continue
            self._said.add(event)
            word = f" ({outcome.took_s:.1f} s)" if outcome.status in DONE else ""
            why = f": {outcome.why}" if outcome.why else ""
            typer.echo(
                f"gpu-check: {now_s:5.0f} s  {outcome.name}: {outcome.status.value}{word}{why}",
                err=True,
            )


def _replace(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.partial")
    half.write_text(text, "utf-8")
    half.replace(path)


def _default_place(cache_dir: Path) -> Path:
    """The current folder, or the cache folder where that one is not for us to write to."""
    here = Path.cwd()
    return (here if os.access(here, os.W_OK) else cache_dir) / REPORT_NAME


@contextmanager
def _scratch(cache_dir: Path) -> Iterator[Path]:
    """An empty folder for models and packs, gone afterwards; so is what a killed run left.

    Raises Refused where it cannot be made or another run has it.
    """
    folder = cache_dir / "gpu-check"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Refused(f"--cache-dir: cannot use {folder}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise Refused(f"--cache-dir: another gpu-check uses {folder}") from error
    try:
        _empty(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
