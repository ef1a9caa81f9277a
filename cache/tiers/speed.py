"""How long one expert takes out of the pack. Knows the file, no slots and no policy."""

import time

from moestro.cache.pack import Pack, page_memory

TIMED_READS = 9


def time_reads(pack: Pack, most_s: float) -> list[float]:
    """Seconds of each of a few reads of one blob, far apart, into memory of their own.

    Stops when `most_s` have passed, after one at least. Checksums are not compared: that is paid
    once per blob, the read every time. Raises ReadFailed.
    """
    layers = pack.spec.layers
    memory = memoryview(page_memory(pack.spec.slot_bytes))
    memory[:] = bytes(len(memory))  # touched now, not while the clock runs
    taken: list[float] = []
    while len(taken) < TIMED_READS and sum(taken) <= most_s:
        number = len(taken)
        layer = number * len(layers) // TIMED_READS
        spec = layers[layer]
        expert = number * spec.num_experts // TIMED_READS
        since_s = time.perf_counter()
        pack.file.read_into(pack.offset(layer, expert), [memory[: spec.layout.stride_bytes]])
        taken.append(time.perf_counter() - since_s)
    return taken
