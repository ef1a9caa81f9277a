"""Slots as memory and what fills them: reader threads, links, the host tier."""

from .cuda_link import STAGING_BYTES, cuda
from .host import TierReader
from .link import Copied, Copy, EmulatedLink, Link, LinkSpec
from .queued_reader import DISK_READERS, QueuedReader, pack_reader
from .slots import Arena, SlotArena
from .speed import time_reads
from .transfer import (
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
    "QueuedReader",
    "ReadRequest",
    "Reader",
    "STAGING_BYTES",
    "SlotArena",
    "TierReader",
    "Wiring",
    "cuda",
    "emulated",
    "pack_reader",
    "runs_of",
    "time_reads",
]
