"""What the link between host and GPU carries, and who waits for whom on it."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from moestro.engine.facts import MIB

from .bench import Bench
from .found import Found

CHUNKS_BYTES = (MIB // 2, 2 * MIB, 8 * MIB)
CHUNK_BYTES = 2 * MIB  # of an expert's copy, as the cache cuts it
SMALL_NUMBERS = 8  # int64: what a step uploads beside expert copies
REPEATS = 9


def link(bench: Bench, found: Found) -> None:
    size_bytes, device = bench.sizes.link_bytes, bench.device
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    for pinned in (True, False):
        host = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        kind = "pinned" if pinned else "pageable"
        for name, source, goal in (
            (f"to_gpu_{kind}", host, target),
            (f"from_gpu_{kind}", target, host),
        ):
            rates = {f"{c / MIB:g} MiB": _rate(source, goal, c, bench) for c in CHUNKS_BYTES}
            found.facts[f"{name}_bytes_per_s"] = rates
            shown = ", ".join(f"{chunk} {rate / 1e9:.1f}" for chunk, rate in rates.items())
            found.lines.append(f"{name.replace('_', ' ')}, GB/s by chunk: {shown}")


def _rate(source: torch.Tensor, target: torch.Tensor, chunk_bytes: int, bench: Bench) -> float:
    """Bytes per second, the second time."""
    for _ in range(2):
        bench.wait()
        began_s = bench.clock()
        for at in range(0, len(source), chunk_bytes):
            target[at : at + chunk_bytes].copy_(source[at : at + chunk_bytes], non_blocking=True)
        bench.wait()
        took_s = bench.clock() - began_s
    return len(source) / took_s


def arbitration(bench: Bench, found: Found) -> None:
    """How long a small copy waits for an expert's on another stream: of indices on the compute

    stream, and of a demanded expert's first chunk behind a guessed expert.
    """
    wires = _Wires(bench.device, bench.sizes.expert_copy_bytes, bench.clock)
    small = torch.zeros(SMALL_NUMBERS, dtype=torch.long, pin_memory=True)
    chunk = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    found.facts["expert_copy_bytes"] = bench.sizes.expert_copy_bytes
    found.facts["expert_copy_s"] = whole_s = wires.expert_s()
    found.lines.append(
        f"an expert of {bench.sizes.expert_copy_bytes // MIB} MiB in chunks of"
        f" {CHUNK_BYTES // MIB} MiB takes {1e3 * whole_s:.2f} ms"
    )
    for name, source, stream in (
        ("64 bytes on the compute stream", small, torch.cuda.current_stream(bench.device)),
        ("one chunk on a second copy stream", chunk, _stream(bench.device)),
    ):
        alone_s = wires.small_s(source, stream, behind_expert=False)
        beside_s = wires.small_s(source, stream, behind_expert=True)
        row: dict[str, Any] = {"alone_s": alone_s, "beside_s": beside_s}
        row["share_of_expert_copy"] = (beside_s - alone_s) / whole_s
        found.facts[name.replace(" ", "_")] = row
        found.lines.append(
            f"{name}: {1e6 * alone_s:.0f} us alone, {1e6 * beside_s:.0f} us behind the expert"
            f" ({100 * row['share_of_expert_copy']:.0f} % of its copy waited for)"
        )


class _Wires:
    """An expert in pinned memory, a place for it on the GPU, and a stream for the way."""

    def __init__(self, device: torch.device, expert_bytes: int, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self._host = torch.zeros(expert_bytes, dtype=torch.uint8, pin_memory=True)
        self._target = torch.empty(expert_bytes, dtype=torch.uint8, device=device)
        self._stream = _stream(device)

    def expert_s(self) -> float:
        return statistics.median(self._timed_expert() for _ in range(REPEATS))

    def small_s(
        self, source: torch.Tensor, stream: torch.cuda.Stream, *, behind_expert: bool
    ) -> float:
        """From when the small copy is asked for until it is there."""
        target = torch.empty_like(source, device=self._device)
        taken = []
        for _ in range(REPEATS):
            torch.cuda.synchronize(self._device)
            if behind_expert:
                self._send_expert()
            began_s = self._clock()
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            stream.synchronize()
            taken.append(self._clock() - began_s)
        torch.cuda.synchronize(self._device)
        return statistics.median(taken)

    def _timed_expert(self) -> float:
        torch.cuda.synchronize(self._device)
        began_s = self._clock()
        self._send_expert()
        self._stream.synchronize()
        return self._clock() - began_s

    def _send_expert(self) -> None:
        with torch.cuda.stream(self._stream):
            for at in range(0, len(self._host), CHUNK_BYTES):
                end = at + CHUNK_BYTES
                self._target[at:end].copy_(self._host[at:end], non_blocking=True)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
