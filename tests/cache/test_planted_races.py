"""The cache of a GPU with one fault built in: the race detector of the imagined GPU names it.

Each fault breaks one thing, everything else is real. None of these need show in the bytes: most of
the time, a GPU that is fast enough forgives them.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_rig import SLOW, OnGpu
from fake_cuda_facts import Gpu
from moestro.cache import Copied, HostMode, Lease, Lru, Pack, Phase
from moestro.cache.tiers.cuda_link import CudaArena, CudaLink
from tiny_packs import build_tiny, tiny_spec
from vector_clocks import Race

SPEC = tiny_spec(6, 6, 6)
STAGED = replace(SLOW, register_bytes=0)


class NeverUsed(CudaArena):
    """Records no event when the work on a slot has been queued."""

    def used(self, slots: Iterable[int]) -> None:
        pass


class Forgetful(CudaLink):
    """A copy does not wait for the event of its slot's last use."""

    def _queue(self, *given: Any) -> None:
        self._device.free = [None] * len(self._device.free)
        super()._queue(*given)


class EarlyLink(CudaLink):
    """Says that a copy has ended when it was only queued."""

    def poll(self) -> list[Copied]:
        copies = [flight.copy for flights in self._flights for flight in flights]
        self._flights = ([], [])
        return [Copied(copy, 0.0) for copy in copies]

    def wait(self) -> list[Copied]:
        return self.poll()


class Unasked(CudaLink):
    """Waits for the right time, but not for the event."""

    def poll(self) -> list[Copied]:
        flights = [flight for both in self._flights for flight in both]
        marks: list[Any] = [flight.under_way[-1][1] for flight in flights]
        if not all(each.mark.ended for each in marks):
            return []
        self._flights = ([], [])
        return [Copied(flight.copy, 0.0) for flight in flights]

    def wait(self) -> list[Copied]:
        while not (ended := self.poll()):
            self.device_clock_turns()
        return ended

    device_clock_turns: Callable[[], None]


def sound(rig: OnGpu) -> None:
    """No fault: the judge must stay silent."""


def slots_are_free_from_the_start(rig: OnGpu) -> None:
    """The event of a lease's slots is recorded when it opens, not when it ends."""
    acquire, used, table = rig.cache.acquire, rig.arena.used, rig.cache._table

    def early(*given: Any) -> Lease:
        lease = acquire(*given)
        used(table.pinned)
        return lease

    rig.cache.acquire = early  # type: ignore[method-assign, assignment]
    rig.arena.used = lambda slots: None  # type: ignore[method-assign]


def used_slots_are_given_up_early(rig: OnGpu) -> None:
    """Experts that wait take over slots of their lease whose use was not recorded."""
    used, table = rig.arena.used, rig.cache._table

    def at_the_end_alone(slots: Iterable[int]) -> None:
        if slots is table.pinned:
            used(slots)

    rig.arena.used = at_the_end_alone  # type: ignore[method-assign]


def host_slots_are_not_pinned(rig: OnGpu) -> None:
    """A host slot may be read into while a copy still reads from it."""
    rig.host._residency.pin = lambda slot: None  # type: ignore[method-assign]
    rig.host._residency.unpin = lambda slot: None  # type: ignore[method-assign]


def host_memory_is_given_back_early(rig: OnGpu) -> None:
    """Closing does not wait for the copies under way."""
    really = rig.link.close

    def close() -> None:
        synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda device=None: None
        try:
            really()
        finally:
            torch.cuda.synchronize = synchronize

    rig.link.close = close  # type: ignore[method-assign]


def unasked(rig: OnGpu) -> None:
    assert isinstance(rig.link, Unasked)
    rig.link.device_clock_turns = lambda: rig.cuda.timeline.turn(100e-6)


COPY, COMPUTE = r"copy .*\(stream \d\)", r"compute \d, \d \(stream 1\)"
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no event of the last use": (f"{COPY} does not wait for {COMPUTE}", {"arena": NeverUsed}),
    "a copy that waits for no event": (f"{COPY} does not wait for {COMPUTE}", {"link": Forgetful}),
    "an event before the use": (
        f"{COPY} does not wait for {COMPUTE}",
        {"plant": slots_are_free_from_the_start},
    ),
    "a slot given up early": (
        f"{COPY} does not wait for {COMPUTE}",
        {"plant": used_slots_are_given_up_early},
    ),
    "compute before the copy's end": (
        f"{COMPUTE} does not wait for {COPY}",
        {"link": EarlyLink, "mode": HostMode.WHOLE},
    ),
    "an end nobody asked for": (
        f"{COMPUTE} does not wait for {COPY}",
        {"link": Unasked, "plant": unasked, "mode": HostMode.WHOLE},
    ),
    "a host slot read into early": (
        rf"the beginning of a read of \d, \d \(host\) does not wait for {COPY}",
        {"plant": host_slots_are_not_pinned},
    ),
    "host memory given back early": (
        rf"cudaHostUnregister \(host\) does not wait for {COPY}",
        {"plant": host_memory_is_given_back_early},
    ),
}


def live(
    pack: Pack,
    gpu: Gpu = SLOW,
    plant: Callable[[OnGpu], None] = sound,
    arena: type[CudaArena] = CudaArena,
    link: type[CudaLink] = CudaLink,
    mode: HostMode = HostMode.INCLUSIVE,
) -> None:
    """A random life of a cache; every expert that is lent is computed with, later."""
    dice = random.Random(7)
    rig = OnGpu(pack, 4, 2, mode, Lru(), Lru(), gpu=gpu, arena=arena, link=link)
    plant(rig)
    try:
        for turn in range(60):
            layer = turn % 3
            experts = dice.sample(range(6), dice.randint(1, 6))
            with rig.cache.acquire(layer, experts, Phase.DECODE) as lease:
                for expert, tensors in lease:
                    rig.look(tensors, layer, expert)
                    if dice.random() < 0.3:
                        rig.end(dice.randrange(rig.moving))
            if dice.random() < 0.5:
                rig.cache.prefetch((layer + 1) % 3, dice.sample(range(6), 2), 2)
            rig.cache.check()
        rig.cache.prefetch(0, [x for x in range(6) if rig.cache.absent(0, [x])], 2)
        rig.disk.finish_all()
        rig.host.poll()  # whose copies have only begun
    finally:
        rig.close()


@pytest.mark.parametrize("gpu", [SLOW, STAGED], ids=["pinned", "staged"])
def test_a_sound_cache_lives_on(tmp_path: Path, gpu: Gpu) -> None:
    live(build_tiny(tmp_path / "tiny.pack", SPEC), gpu)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(tmp_path: Path, fault: str) -> None:
    words, planted = FAULTS[fault]
    pack = build_tiny(tmp_path / "tiny.pack", SPEC)
    with pytest.raises(Race, match=words):
        live(pack, **planted)
