"""Short measurements of this machine: how fast the disk gives experts, how fast they multiply.

Each takes a fraction of a second and keeps the best of what it saw: the results feed bounds. They
run in the formats that serving would use.
"""

import copy
import fcntl
import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.engine.facts import StartError
from moestro.engine.formats import Codec

from .forecast import LinkSpeed

PAGE_BYTES = 4096  # unit of direct reads
READ_S = 0.15  # for each of the two ways to read
ORDERED_BYTES = 8 << 20  # neighbours in one read
LEAST_FILE_BYTES = 16 << 20  # a smaller file would be read from one place again and again
SCRATCH_BYTES = 32 << 20
MULTIPLY_S = 0.08  # for each kind of product
WORKING_SET_BYTES = 64 << 20  # more than the caches near a core hold: decoding reads memory
DECODE_NUMBERS = 8 << 20  # weights in one copy of the matrices; more take too long to make
PREFILL_PRODUCTS = 1 << 30  # multiply-adds: one run must fit into its time


def measure_link(cache_dir: Path, blob_bytes: int, candidates: Iterable[Path]) -> LinkSpeed:
    """Reads of `blob_bytes` here and there, and of neighbours, past the page cache.

    Reads the first of `candidates` that is large and on the disk of `cache_dir`, else a scratch
    file in the nearest folder that exists. Raises StartError where neither works.
    """
    folder = next(place for place in (cache_dir, *cache_dir.parents) if place.is_dir())
    try:
        with _file_on_disk_of(folder, candidates) as path, _opened(path) as (file, direct):
            scattered = _read_rate(file, direct, blob_bytes)
            ordered = _read_rate(file, direct, ORDERED_BYTES)
    except OSError as error:
        raise StartError(
            f"the disk of {folder} cannot be measured ({error.strerror}); say how fast it is with"
            " --disk-speed 500MB"
        ) from error
    # Neighbours are never slower than apart; a short test may say so.
    how = "O_DIRECT" if direct else "buffered: the file system has no O_DIRECT"
    return LinkSpeed(scattered, max(scattered, ordered), f"measured in {folder}, {how}")


@contextmanager
def _file_on_disk_of(folder: Path, candidates: Iterable[Path]) -> Iterator[Path]:
    device = folder.stat().st_dev
    for path in candidates:
        if path.is_file():
            facts = path.stat()
            if facts.st_dev == device and facts.st_size >= LEAST_FILE_BYTES:
                yield path
                return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moestro-speed-") as file:
        for _ in range(SCRATCH_BYTES >> 20):
            file.write(os.urandom(1 << 20))  # some disks are quicker with zeros
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, bool]]:
    """A descriptor, and whether it reads directly: like the cache, if the file system grants it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        direct = _make_direct(descriptor)
        yield descriptor, direct
    finally:
        os.close(descriptor)


def _make_direct(descriptor: int) -> bool:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, PAGE_BYTES) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:  # some file systems grant the flag and refuse the first read
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return False
    return True


def _read_rate(descriptor: int, direct: bool, read_bytes: int) -> float:
    """Bytes per second of reads of `read_bytes` at random pages, one after the other."""
    size_bytes = os.fstat(descriptor).st_size
    length = max(PAGE_BYTES, min(read_bytes, size_bytes // 4) // PAGE_BYTES * PAGE_BYTES)
    places, draw = (size_bytes - length) // PAGE_BYTES + 1, random.Random(0)
    done_bytes = 0
    with mmap.mmap(-1, length) as buffer:
        buffer.write(bytes(length))  # touched now, not while the clock runs
        began_s = time.perf_counter()
        while (spent_s := time.perf_counter() - began_s) < READ_S or not done_bytes:
            place = draw.randrange(places) * PAGE_BYTES
            done_bytes += os.preadv(descriptor, [buffer], place)
            if not direct:
                os.posix_fadvise(descriptor, place, length, os.POSIX_FADV_DONTNEED)
    return done_bytes / spent_s


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of one expert or of a dense part, as (dtype, shape without experts)."""

    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    transposed: bool  # [in, out]
    numbers: int  # of all there are, however many experts

    @property
    def numbers_each(self) -> int:
        return sum(torch.Size(shape).numel() for _, shape in self.shapes.values())


def measure_multiply(codec: Codec, matrices: Matrices, rows: int) -> float:
    """Multiply-adds per second of `rows` rows with matrices of this kind, the best of some runs."""
    one = _Product(codec, matrices, rows)
    products, held_bytes = [one], one.held_bytes
    most_bytes = min(WORKING_SET_BYTES, matrices.numbers * one.held_bytes // one.numbers)
    while rows == 1 and held_bytes + one.held_bytes <= most_bytes:
        products.append(one.copy())
        held_bytes += one.held_bytes
    # Alone on its thread, the work is what the clock of the thread says: others do not count.
    clock_s = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best_s, began_s, turn = float("inf"), time.perf_counter(), 0
    with torch.inference_mode():
        # A thread's clock can be coarse: a turn that took no tick says nothing.
        while turn < 2 or best_s == float("inf") or time.perf_counter() - began_s < MULTIPLY_S:
            since_s = clock_s()
            for product in products:
                product.run()
            taken_s = clock_s() - since_s
            best_s = min(best_s, taken_s) if taken_s > 0 else best_s
            turn += 1
    return rows * one.numbers * len(products) / best_s


class _Product:
    """Matrices of ones as the codec keeps them, and rows to multiply them with."""

    def __init__(self, codec: Codec, matrices: Matrices, rows: int) -> None:
        shapes = _shrunk(matrices, min(DECODE_NUMBERS, PREFILL_PRODUCTS // rows))
        ones = {
            name: torch.ones((1, *shape), dtype=dtype) for name, (dtype, shape) in shapes.items()
        }
        packed = codec.encode(ones, matrices.transposed)
        self.numbers = sum(tensor.numel() for tensor in ones.values())
        self._codec, self._transposed = codec, matrices.transposed
        self._names = list(ones)
        self._hold({name: tensor[0] for name, tensor in packed.items()})
        inputs = 0 if matrices.transposed else 1
        self._rows = {name: torch.ones(rows, shape[inputs]) for name, (_, shape) in shapes.items()}

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._packed.values())

    def copy(self) -> "_Product":
        """The same in other memory."""
        other = copy.copy(self)
        other._hold({name: tensor.clone() for name, tensor in self._packed.items()})
        return other

    def _hold(self, packed: dict[str, torch.Tensor]) -> None:
        self._packed = packed
        self._matrices = {
            name: self._codec.open(packed, name, self._transposed) for name in self._names
        }

    def run(self) -> None:
        for name, rows in self._rows.items():
            self._codec.multiply(self._codec.begin(rows), self._matrices[name])


def _shrunk(
    matrices: Matrices, most_numbers: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The same matrices with fewer outputs, where one alone would take too long."""
    factor = min(1.0, most_numbers / matrices.numbers_each)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in matrices.shapes.items():
        outputs = shape[1] if matrices.transposed else shape[0]
        inputs = shape[0] if matrices.transposed else shape[1]
        fewer = max(16, int(outputs * factor) // 16 * 16) if factor < 1 else outputs
        found[name] = (dtype, (inputs, fewer) if matrices.transposed else (fewer, inputs))
    return found
