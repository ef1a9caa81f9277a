"""The first line of the process: a signal is answered before anything else is imported.

As process 1 of a container a signal without a handler is ignored, so that stopping would take until
SIGKILL; and the imports of a start take seconds. Until a command takes over, a signal ends the
process here and now: nothing has been written that would have to be undone.
"""

import os
import signal
import sys
from types import FrameType

SERVING_ENDS = 0  # `serve` was asked to stop and stopped, however early
TERMINATED = 128 + signal.SIGTERM
HUNG_UP = 128 + signal.SIGHUP


def end_at_once(number: int, _: FrameType | None) -> None:
    """Without unwinding: some libraries swallow exceptions while they are imported."""
    serving = sys.argv[1:2] == ["serve"]
    os._exit(SERVING_ENDS if serving else 128 + number)


def answer_signals() -> None:
    """SIGHUP that was ignored from outside (nohup) stays ignored."""
    signal.signal(signal.SIGTERM, end_at_once)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end_at_once)


def main() -> None:
    """The `moestro` command."""
    answer_signals()
    from moestro.server.commands import main as run

    run()
