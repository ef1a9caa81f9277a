"""Slots as memory and what fills them: reader threads, links, the host tier."""

from .cuda_link import STAGING_BYTES, cuda
from .host import TierReader
from .link import Copied, Copy, EmulatedLink, Link, LinkSpec
from .slots import Arena, SlotArena
from .speed import time_reads
from .transfer import (
    DISK_READERS,
    MOST_BYTES_AT_ONCE,
    Completion,
    DirectReader,
    Failure,
    LendingReader,
    PackReader,
    Reader,
    ReadRequest,
    runs_of,
)
from .wiring import Wiring, emulated

__all__ = [
    "Arena",
    "Completion",
    "Copied",
    "Copy",
    "DISK_READERS",
    "DirectReader",
    "EmulatedLink",
    "Failure",
    "LendingReader",
    "Link",
    "LinkSpec",
    "MOST_BYTES_AT_ONCE",
    "PackReader",
    "ReadRequest",
    "Reader",
    "STAGING_BYTES",
    "SlotArena",
    "TierReader",
    "Wiring",
    "cuda",
    "emulated",
    "runs_of",
    "time_reads",
]
