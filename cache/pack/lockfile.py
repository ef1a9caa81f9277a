"""Whether this process alone may write: flock on a file that stays, and what is known of it.

Some file systems have no locks, and some say yes to everybody. Then nobody is kept out, and who
writes has to do so under names that are its own. Knows no pack and no model.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

_log = logging.getLogger("moestro.cache")

_POLL_S = 0.2


class Lock(Enum):
    """HELD until the descriptor is closed, also by a kill; BUSY: another has it."""

    HELD = 1
    BUSY = 2
    NONE = 3  # the file system has no locks that keep anybody out


def try_lock(fd: int, path: Path) -> Lock:
    """`fd` is of the file `path`, open for writing."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.BUSY
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: whatever it is, there is no lock
        return Lock.NONE
    return Lock.NONE if _granted_again(path) else Lock.HELD


def wait_for_lock(fd: int, path: Path, on_wait: Callable[[], None]) -> bool:
    """True when it is held; False, and a warning, where there are no locks.

    `on_wait` is called again and again while another has it, and may raise to give up.
    """
    while (lock := try_lock(fd, path)) is Lock.BUSY:
        on_wait()
        time.sleep(_POLL_S)
    if lock is Lock.NONE:
        _log.warning(
            "%s: this file system has no locks; starts at the same time do the same work twice",
            path.parent,
        )
    return lock is Lock.HELD


def _granted_again(path: Path) -> bool:
    """A lock that is held must be refused to a second descriptor, even of the same process."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
