"""Huge pages for memory that is read as long streams, where the system gives them at once.

A stream over 4 KiB pages waits for the processor's page tables; over 2 MiB pages it hardly does.
Where the system would first have to move other pages together, asking costs more than it ever
gains: so it is asked only while enough of such blocks lie free.
"""

import mmap
from pathlib import Path

BUDDIES = Path("/proc/buddyinfo")
LEAST_BYTES = 16 << 20
HUGE_BYTES = 2 << 20
SPARE = 1.25  # of what is asked for must lie free


def free_huge_bytes(path: Path = BUDDIES) -> int:
    """In free blocks of a huge page or more; 0 where the system does not say."""
    found = 0
    try:
        for line in path.read_text("ascii").splitlines():
            counts = line.partition("zone")[2].split()[1:]
            sizes = (mmap.PAGESIZE << order for order in range(len(counts)))
            pairs = zip(map(int, counts), sizes, strict=True)
            found += sum(count * size for count, size in pairs if size >= HUGE_BYTES)
    except (OSError, ValueError):
        return 0
    return found


def ask_for_huge_pages(memory: mmap.mmap, free_bytes: int) -> bool:
    """For all of it, where so much lies free; whether they were asked for."""
    size_bytes = len(memory)
    if size_bytes < LEAST_BYTES or free_bytes < SPARE * size_bytes:
        return False
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError):  # a kernel or a Python that knows none
        return False
    return True
