"""The first line of the process: a signal is answered before anything else is imported.

As process 1 of a container a signal without a handler is ignored, so that stopping would take until
SIGKILL; and the imports of a start take seconds. Until a command takes over, a signal ends the
process here and now: nothing has been written that would have to be undone.
"""

import os
import signal
import sys
from types import FrameType


def end_at_once(number: int, _: FrameType | None) -> None:
    """Without unwinding: some libraries swallow exceptions while they are imported.

    A server that was asked to stop and stopped, however early, ends with 0.
    """
    serving = sys.argv[1:2] == ["serve"]
    os._exit(0 if serving and number != signal.SIGINT else 128 + number)


def answer_signals() -> None:
    """Those that were ignored from outside (nohup, a shell's background) stay ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_at_once)


def main() -> None:
    """The `moestro` command."""
    answer_signals()
    from moestro.server.commands import main as run

    run()
