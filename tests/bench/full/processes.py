"""Turns run in processes of their own: first in line for a core, perhaps in a memory group.

Everybody measured is started the same way, so that whoever else works on the machine takes from
all of them alike, and little.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
PRIORITY = -15
# Where Linux shares cores among sessions first, a process's priority counts inside its own alone.
SESSION_PRIORITY = Path("/proc/self/autogroup")
SAMPLE_S = 0.02
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class TurnFailed(Exception):
    """A process that was to be measured ended badly; the message has its last lines."""


@dataclass(frozen=True, slots=True)
class Outcome:
    stdout: str
    seconds: float
    peak_rss_bytes: int  # of the process and its children together, seen from outside


def run(
    command: Sequence[str | Path],
    *,
    group: "Path | None" = None,
    timeout_s: float = 3600.0,
    environment: dict[str, str] | None = None,
    threads: int = 1,
    watch: Callable[[psutil.Process], None] | None = None,
) -> Outcome:
    """Raises TurnFailed. `group` is a memory group's folder; `watch` is called at every sample."""
    began = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            **QUIET,
            **dict.fromkeys(THREADS, str(threads)),
            **(environment or {}),
        },
        preexec_fn=lambda: _enter(group),
        start_new_session=True,
    )
    sampler = _Sampler(process.pid, watch)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    finally:
        sampler.stop()
        if process.poll() is None:  # too slow, or we are being stopped
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode != 0:
        tail = "\n".join((stderr or stdout).strip().splitlines()[-12:])
        killed = " (killed: out of memory?)" if process.returncode == -signal.SIGKILL else ""
        raise TurnFailed(f"{command[0]} ended with {process.returncode}{killed}:\n{tail}")
    return Outcome(stdout + "\n" + stderr, time.monotonic() - began, sampler.peak_bytes)


def _enter(group: Path | None) -> None:
    """In the child, before it becomes the command."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
        if SESSION_PRIORITY.exists():
            SESSION_PRIORITY.write_text(str(PRIORITY))
    except OSError:  # not permitted, or not so often
        return  # as good as anybody's, then


class _Sampler:
    """Looks at a process from outside until it is told to stop."""

    def __init__(self, pid: int, watch: Callable[[psutil.Process], None] | None) -> None:
        self.peak_bytes = 0
        self._watch = watch
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(pid,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            while not self._over.wait(SAMPLE_S):
                self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
                if self._watch is not None:
                    self._watch(process)
        except psutil.NoSuchProcess:
            return


def last_json(text: str) -> dict[str, Any]:
    """The last line of `text` that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{") and line.rstrip().endswith("}"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise TurnFailed(f"no JSON line in: {text[-400:]!r}")


def module(name: str, *arguments: object, **settings: Any) -> Outcome:
    """`python -m name` of this benchmark, with this interpreter."""
    tests = HERE.parents[1]
    paths = [str(tests / "bench"), str(tests / "support"), os.environ.get("PYTHONPATH", "")]
    return run(
        [sys.executable, "-m", name, *map(str, arguments)],
        environment={"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        **settings,
    )
