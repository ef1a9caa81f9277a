"""How fast a file's pieces can be read from the disk at this moment, past the page cache."""

import mmap
import os
import random
import threading
import time
from pathlib import Path

from moestro.cache.tiers import DISK_READERS
from moestro.cache.tiers.queued_reader import READS_UNDER_WAY, SMALL_BYTES

ALIGNMENT = 4096
ROUNDS, ROUND_S = 3, 1.0


def readers_of(slot_bytes: int) -> int:
    """Reads that the cache has under way at once, of experts that large."""
    return READS_UNDER_WAY if slot_bytes <= SMALL_BYTES else DISK_READERS


def read_bytes_per_s(path: Path, piece_bytes: int, readers: int) -> float:
    """Of `readers` threads that each read one piece after the other, anywhere in `path`; the best

    of some rounds. Raises OSError where the file system has no direct reads.
    """
    piece_bytes = max(ALIGNMENT, piece_bytes // ALIGNMENT * ALIGNMENT)
    pieces = max(1, path.stat().st_size // piece_bytes)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return max(_round(file, piece_bytes, pieces, readers, seed) for seed in range(ROUNDS))
    finally:
        os.close(file)


def _round(file: int, piece_bytes: int, pieces: int, readers: int, seed: int) -> float:
    counts = [0] * readers
    began = time.perf_counter()

    def read(number: int) -> None:
        draw = random.Random(seed * readers + number)
        with mmap.mmap(-1, piece_bytes) as buffer:
            while time.perf_counter() - began < ROUND_S:
                counts[number] += os.preadv(file, [buffer], draw.randrange(pieces) * piece_bytes)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)
