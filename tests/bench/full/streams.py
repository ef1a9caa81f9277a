"""How fast memory can be read at this moment: the ceiling of decode.

python -m full.streams BUILD_DIR THREADS      (one JSON line; the benchmark starts it as a turn)

Neighbours on the machine change it from minute to minute, and processors differ in what they like
best, so it is the best of several ways: 1, 2 and 4 sequential streams per thread, prefetched or
not, in normal and in huge pages. Every thread reads a block of its own.
"""

import ctypes
import json
import mmap
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
BLOCK_BYTES = 768 << 20  # of all threads together: more than the processors' caches hold
HUGE_BYTES = 2 << 20
STREAMS = (1, 2, 4)
AHEAD_BYTES = (0, 2048)
PAGES = ("normal", "huge")
PASSES = 3  # of each way; the best counts, for whatever disturbs only slows down
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")

Read = Callable[[int, int, int, int], int]  # address, bytes, streams, bytes ahead


class NoCompiler(Exception):
    """The memory's speed cannot be measured; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Bytes per second of all threads together."""

    threads: int
    best: float
    best_way: str
    ways: dict[str, float]


def measure(read: Read, threads: int, block_bytes: int = BLOCK_BYTES) -> Streams:
    """The best of all ways. Raises nothing: a page size that is not to be had is as the other."""
    each = block_bytes // threads // HUGE_BYTES * HUGE_BYTES
    ways = {}
    for pages in PAGES:
        with blocks(threads, each, pages) as addresses, ThreadPoolExecutor(threads) as pool:
            for streams, ahead in product(STREAMS, AHEAD_BYTES):
                name = f"{streams} x {pages}" + (f", {ahead} ahead" if ahead else "")
                seconds = min(
                    timed(pool, read, addresses, (each, streams, ahead)) for _ in range(PASSES)
                )
                ways[name] = threads * each / seconds
    best = max(ways, key=ways.__getitem__)
    return Streams(threads, ways[best], best, ways)


def timed(
    pool: ThreadPoolExecutor, read: Read, addresses: list[int], how: tuple[int, int, int]
) -> float:
    """Seconds until the last thread has read its block."""
    began = time.perf_counter()
    list(pool.map(lambda address: read(address, *how), addresses))
    return time.perf_counter() - began


@contextmanager
def blocks(count: int, each_bytes: int, pages: str) -> Iterator[list[int]]:
    """Addresses of written memory, aligned to a huge page; gone afterwards."""
    maps = [mmap.mmap(-1, each_bytes + HUGE_BYTES) for _ in range(count)]
    views = []
    for each in maps:
        each.madvise(mmap.MADV_HUGEPAGE if pages == "huge" else mmap.MADV_NOHUGEPAGE)
        views.append((ctypes.c_char * len(each)).from_buffer(each))
        ctypes.memset(views[-1], 1, len(each))
    try:
        yield [-(-ctypes.addressof(view) // HUGE_BYTES) * HUGE_BYTES for view in views]
    finally:
        views.clear()
        for each in maps:
            each.close()


def build(folder: Path) -> Read:
    """Compiles streams.c into `folder`, once; the interpreter lock is released while it reads.

    Raises NoCompiler.
    """
    library = folder / "streams.so"
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
        if compiler is None:
            raise NoCompiler(f"no C compiler ({', '.join(COMPILERS)}): install gcc")
        folder.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(".part")
        subprocess.run([compiler, *FLAGS, SOURCE, "-o", part], check=True)
        part.replace(library)
    read = ctypes.CDLL(str(library)).read_streams
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t]
    read.restype = ctypes.c_uint64
    return read


if __name__ == "__main__":
    print(json.dumps(asdict(measure(build(Path(sys.argv[1])), int(sys.argv[2])))))
