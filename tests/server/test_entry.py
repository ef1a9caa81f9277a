"""Signals before any command has begun: real ones, in a process that has imported nothing else."""

import signal
import subprocess
import sys

import pytest

EARLY = """
import os, signal, sys
sys.argv = ["moestro", {command!r}]
from moestro.server import entry
entry.answer_signals()
assert "typer" not in sys.modules and "torch" not in sys.modules
os.kill(os.getpid(), {number})
while True:
    signal.pause()
"""
UNWOUND = """
import os, signal
from moestro.server.commands import cli
cli._unwind_when_terminated()
try:
    os.kill(os.getpid(), {number})
    while True:
        signal.pause()
finally:
    print("cleaned up", flush=True)
"""


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("serve", signal.SIGTERM, 0),
        ("serve", signal.SIGHUP, 0),
        ("serve", signal.SIGINT, 130),
        ("plan", signal.SIGTERM, 143),
        ("factorize", signal.SIGHUP, 129),
    ],
)
def test_a_signal_ends_the_first_moments(command: str, number: int, code: int) -> None:
    done = run(EARLY.format(command=command, number=int(number)))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_command_at_work_is_unwound() -> None:
    done = run(UNWOUND.format(number=int(signal.SIGTERM)))
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")
