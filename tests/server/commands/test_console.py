"""Progress as lines and as bars."""

import io
import logging

from rich.console import Console

from moestro.engine import Progress
from moestro.server.commands.console import (
    ProgressBars,
    ProgressLines,
    progress_view,
    set_up_logging,
)


def test_one_line_per_tenth(caplog):
    lines = ProgressLines()
    with caplog.at_level(logging.INFO, "moestro"):
        for done in range(101):
            lines(Progress("download", done << 20, 100 << 20, "bytes"))
        lines(Progress("load", 0, 0))
        lines.close()
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "download …"
    assert messages[4] == "download 40 % (40.0 of 100.0 MiB)"
    assert messages[10] == "download 100 % (100.0 of 100.0 MiB)"
    assert messages[11].startswith("download took ")
    assert messages[12] == "load …"
    assert len(messages) == 14


def test_no_bars_without_a_terminal():
    assert isinstance(progress_view(Console(file=io.StringIO())), ProgressLines)


def test_bars_and_log_lines_share_a_terminal(caplog):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        set_up_logging(console)
        bars = progress_view(console)
        assert isinstance(bars, ProgressBars)
        bars(Progress("pack", 1, 2, "layers"))
        logging.getLogger("moestro.engine").info("plan: [bold]16 MiB[/bold]")
        logging.getLogger("other").info("not shown")
        bars(Progress("load", 0, 0))
        bars.close()
    finally:
        root.handlers = before
        root.setLevel(level)
        logging.captureWarnings(False)
    text = file.getvalue()
    assert "pack" in text and "1 of 2 layers" in text and "load" in text
    assert "INFO moestro.engine: plan: [bold]16 MiB[/bold]" in text
    assert "not shown" not in text
