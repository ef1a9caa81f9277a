"""A child process that does not outlive its parent, whatever ends that one.

The kernel is asked for it by the child itself, before it becomes the program that is wanted: code
run between fork and exec (`preexec_fn`) could wait for ever for a lock of another thread. It holds
for the life of the thread that starts the child, which therefore has to wait for it.
"""

import os
import sys
from collections.abc import Sequence

# A parent that was gone before the kernel was asked is told by the child's having another one.
_BECOME = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def dying_with(parent_pid: int, command: Sequence[str]) -> list[str]:
    """`command`, whose first word is a path, to be started by process `parent_pid`."""
    return [sys.executable, "-I", "-S", "-c", _BECOME, str(parent_pid), *command]


def dying_with_us(command: Sequence[str]) -> list[str]:
    return dying_with(os.getpid(), command)
