"""What the host tier should keep: the demo model's traces through two tiers, replayed.

    make bench ARGS=bench_tiers

Device slots and host slots hold less than all experts together; what neither has is read from the
pack. The figure is reads per generated token. Both tiers decide with the live code; copies and
reads end at once.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import torch
from bench_policies import SETTINGS, WORKLOADS, record

from engine_kit import MIB, opened
from moestro.cache import HostMode, NextUse, Phase, TraceEvent, TraceReader
from moestro.cache.policy.counters import Counters
from moestro.cache.policy.host_residency import HostResidency
from moestro.cache.policy.residency import Residency
from moestro.cache.policy.table import SlotTable
from moestro.cache.traces.replayer import _run
from moestro.factorize import prepare_demo

SHARES = (1, 2, 4, 8, 12)  # device slots, in sixteenths of all experts
HOSTS = (4, 8, 12)  # host slots, too


class LatestFirst(HostResidency):
    """Of those on the device, the last to have come up leaves first."""

    def unpin(self, slot: int) -> None:
        super().unpin(slot)
        if self._doubled.pop(slot, slot) is None:
            self._doubled = {slot: None} | self._doubled


class Replay:
    """One pair of tiers."""

    def __init__(
        self,
        experts: Sequence[int],
        slots: int,
        host_slots: int,
        mode: HostMode,
        kind: type[HostResidency] = HostResidency,
    ) -> None:
        table = SlotTable(slots, experts)
        self.device = Residency(table, NextUse(), Counters(len(experts)), experts)
        self.host = kind(SlotTable(host_slots, experts), table, NextUse(), mode)
        self.reads = dict.fromkeys(Phase, 0)
        self._phase = Phase.DECODE
        take = self.device.take

        def taking(layer: int, experts: Sequence[int], passing: int = 0) -> list[int]:
            found = take(layer, experts, passing)
            self._fetch(layer, experts)
            return found

        self.device.take = taking  # type: ignore[method-assign]

    def run(self, events: Sequence[TraceEvent], *, hears_all: bool) -> None:
        for event in events:
            self._phase = event.phase
            if hears_all:
                self.host.asked(event.layer, event.experts)
            else:
                row = self.device.table.where[event.layer]
                self.host.asked(event.layer, [x for x in event.experts if row[x] < 0])
            _run(self.device, event)

    def _fetch(self, layer: int, experts: Sequence[int]) -> None:
        """As TierReader does: who is here is copied first, the others take what room there is."""
        host, table = self.host, self.host.table
        row = table.where[layer]
        here = [row[expert] for expert in experts if row[expert] >= 0]
        missing = [expert for expert in experts if row[expert] < 0]
        for slot in here:
            host.pin(slot)
        while missing:
            room = host.make_room(len(missing))
            if not room:  # a copy has to end first
                host.unpin(here.pop(0))
                continue
            for expert in missing[:room]:
                slot = host.take(host.keys[layer][expert])
                table.arrived([slot])
                host.pin(slot)
                here.append(slot)
            self.reads[self._phase] += room
            missing = missing[room:]
        for slot in here:
            host.unpin(slot)


def main() -> None:
    torch.set_num_threads(1)
    cache_dir = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    demo = prepare_demo(cache_dir, lambda _: None)
    report.show(f"machine: {report.machine()}")
    results: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        opened(demo, cache_dir, host_memory_bytes=90 * MIB, **SETTINGS) as loaded,
    ):
        for name, runs in WORKLOADS.items():
            path = Path(scratch) / f"{name}.trace"
            record(loaded, path, runs)
            results[name] = table(name, TraceReader(path))
    report.finish("tiers", results)


WAYS: dict[str, tuple[HostMode, type[HostResidency], bool]] = {
    "inclusive, hears every event": (HostMode.INCLUSIVE, HostResidency, True),
    "inclusive, hears misses": (HostMode.INCLUSIVE, HostResidency, False),
    "exclusive, hears every event": (HostMode.EXCLUSIVE, HostResidency, True),
    "exclusive, latest first": (HostMode.EXCLUSIVE, LatestFirst, False),
    "exclusive (default)": (HostMode.EXCLUSIVE, HostResidency, False),
}


def table(name: str, trace: TraceReader) -> dict[str, Any]:
    """Prints reads per generated token by way (rows) and device slots (columns)."""
    events, experts = list(trace), trace.header.experts_per_layer
    total = sum(experts)
    decode = [event for event in events if event.phase is Phase.DECODE]
    steps = max(1, len(decode) // len(experts))
    asked = sum(len(event.experts) for event in decode) / steps
    report.show(f"{name}: {asked:.0f} experts a step; read from the pack in each")
    found: dict[str, Any] = {}
    for host in HOSTS:
        host_slots = total * host // 16
        report.show(f"  host slots {host_slots} of {total}, device slots:")
        report.show(" " * 34 + "".join(f"{total * share // 16:>8}" for share in SHARES))
        for way, (mode, kind, hears_all) in WAYS.items():
            row = []
            for share in SHARES:
                pair = Replay(experts, total * share // 16, host_slots, mode, kind)
                pair.run(events, hears_all=hears_all)
                row.append(pair.reads[Phase.DECODE] / steps)
            report.show(f"    {way:30}" + "".join(f"{reads:8.1f}" for reads in row))
            found[f"{host_slots} {way}"] = row
    return {"reads_per_step": found, "device_slots": [total * share // 16 for share in SHARES]}


if __name__ == "__main__":
    main()
