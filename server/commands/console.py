"""What the terminal shows while the server starts and runs: log lines and progress.

Bars on a terminal, one line per tenth elsewhere. Called from the engine's thread and the event
loop's; knows neither.
"""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moestro.engine import Progress as Notice

log = logging.getLogger("moestro.server")


class ConsoleHandler(logging.Handler):
    """Prints above a running bar instead of through it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def set_up_logging(console: Console) -> None:
    """moestro speaks from INFO on, everybody else from WARNING on; no access log."""
    handler: logging.Handler = logging.StreamHandler()
    if console.is_terminal:
        handler = ConsoleHandler(console)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("moestro").setLevel(logging.INFO)
    logging.captureWarnings(True)


class ProgressLines:
    """One log line per started tenth of a phase, and one with its seconds at its end."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._tenth = 0
        self._began_s = 0.0

    def __call__(self, notice: Notice) -> None:
        if notice.phase != self._phase:
            self.close()
            self._phase, self._tenth, self._began_s = notice.phase, 0, time.monotonic()
            log.info("%s …", notice.phase)
        tenth = min(10, notice.done * 10 // notice.total) if notice.total else 0
        if tenth > self._tenth:
            self._tenth = tenth
            log.info("%s %d %% (%s)", notice.phase, tenth * 10, _amount(notice))

    def close(self) -> None:
        if self._phase is not None:
            log.info("%s took %.1f s", self._phase, time.monotonic() - self._began_s)
        self._phase = None


class ProgressBars:
    """One bar per phase; the bar of the phase before stays, full."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._phase: str | None = None
        self._task: TaskID | None = None

    def __call__(self, notice: Notice) -> None:
        if notice.phase != self._phase or self._task is None:
            self._end_phase()
            self._phase = notice.phase
            self._task = self._bars.add_task(notice.phase, total=None, amount="")
            self._bars.start()
        self._bars.update(
            self._task,
            completed=notice.done,
            total=notice.total or None,
            amount=_amount(notice),
        )

    def _end_phase(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[self._task].completed or 1
            self._bars.update(self._task, total=done, completed=done)
            self._bars.stop_task(self._task)
        self._task = None

    def close(self) -> None:
        self._end_phase()
        self._bars.stop()


def progress_view(console: Console) -> ProgressBars | ProgressLines:
    return ProgressBars(console) if console.is_terminal else ProgressLines()


def _amount(notice: Notice) -> str:
    if notice.unit == "bytes":
        done, total = (f"{count / 2**20:.1f}" for count in (notice.done, notice.total))
        unit = "MiB"
    else:
        done, total, unit = str(notice.done), str(notice.total), notice.unit
    return f"{done} of {total} {unit}".strip() if notice.total else f"{done} {unit}".strip()
