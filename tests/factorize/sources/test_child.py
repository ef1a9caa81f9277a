"""The kernel ends the child when the parent is killed, and a child of the dead never begins."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from moestro.engine import Progress
from moestro.factorize.sources.child import dying_with
from moestro.factorize.sources.download import _watch

CHILD = "import signal; print('up', flush=True); signal.pause()"
PARENT = """
import json, os, signal, subprocess, sys
command = [word.replace("PARENT", str(os.getpid())) for word in json.loads(sys.argv[1])]
subprocess.Popen(command)
signal.pause()
"""
ASK = """
import ctypes
found = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
print(found.value)
"""


def quiet(_: Progress) -> None:
    pass


def test_it_ends_when_its_parent_is_killed() -> None:
    command = dying_with(0, [sys.executable, "-c", CHILD])
    command[command.index("0")] = "PARENT"
    ended = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(command)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"

        def read_to_the_end(pipe: int = parent.stdout.fileno()) -> None:
            os.read(pipe, 1)  # both held the pipe: it ends with the last of them
            ended.set()

        threading.Thread(target=read_to_the_end, daemon=True).start()
        parent.kill()
        assert parent.wait(10) == -signal.SIGKILL
        assert ended.wait(10), "the child runs on"


def test_a_child_whose_parent_is_gone_does_nothing() -> None:
    command = dying_with(1 << 22, [sys.executable, "-c", "print('ran')"])  # no process has this id
    assert subprocess.run(command, capture_output=True, check=True).stdout == b""


def test_the_download_is_such_a_child(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        code = _watch([sys.executable, "-c", ASK], tmp_path, tmp_path, log.fileno(), 1, quiet)
        log.seek(0)
        assert (code, log.read()) == (0, f"{int(signal.SIGKILL)}\n")
