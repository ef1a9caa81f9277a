"""What can go wrong below the engine.

CacheError
├── DoesNotFit        a budget cannot hold what one step needs (start-up; the message has the sums)
├── NoDiskSpace       the pack would not fit on its disk, or the disk filled while writing
├── PackUnwritable    the folder or its file system refuses the pack for another reason
├── PackInvalid       a pack file is missing, foreign, truncated or corrupt (the caller rebuilds)
├── TraceInvalid      a trace file is missing, foreign or damaged
├── ReadFailed        the operating system refused a read while serving
└── DeviceFailed      the GPU reported an error that stays, or is gone (nothing there works again)
"""


class CacheError(Exception):
    """Root of the room; raised by nobody itself, caught by who only wants a message."""


class DoesNotFit(CacheError):
    """Raised when planning; the caller refuses to start."""

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class NoDiskSpace(CacheError):
    """Raised by the pack writer before or while it writes; nothing half-written stays."""


class PackUnwritable(CacheError):
    """Raised before or while a pack is written: no permission, read-only, a disk error."""


class PackInvalid(CacheError):
    """Raised on opening a pack, or at the first read of a blob whose checksum differs."""


class TraceInvalid(CacheError):
    """Raised while a trace is read; the message names file and line."""


class ReadFailed(CacheError):
    """Raised by a lease when a blob could not be read; the step fails, the cache stays whole."""


class DeviceFailed(CacheError):
    """Raised by whatever asks the GPU, from its first error on and each time again.

    What its slots hold is lost; closing the cache still ends its threads and frees the host.
    """
