"""Caches of one tier and of two, where reads and copies end when the test says so.

`Rig.here` is the judge: whose bytes are whole in the slots that are computed from, by the rig's own
notes, kept apart from the cache's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from manual_reader import GARBAGE, ManualReader
from moestro.cache import (
    Copy,
    EmulatedLink,
    ExpertCache,
    HostMode,
    LinkSpec,
    Pack,
    Policy,
    ReadFailed,
    ReadRequest,
    TierPlan,
    plan_slots,
    two_tiers,
)
from moestro.cache.tiers.slots import AliasArena, Arena, SlotArena
from moestro.cache.tiers.wiring import moving, showing
from tiny_packs import assert_is

Key = tuple[int, int]
SPEC = LinkSpec(bandwidth_bytes_per_s=4096.0, latency_s=0.25)  # a small expert takes 1.25 s


@dataclass
class Clock:
    """Turned by hand, or by who would sleep."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        # A hair more, or sums of floats would leave a sleeper just short of his hour.
        self.now_s += seconds + 1e-9


class Rig(Protocol):
    """What a test holds in its hand."""

    cache: ExpertCache
    failures: list[ReadFailed]

    def here(self) -> set[Key]:
        """Experts whose bytes are whole in a slot that is computed from."""

    @property
    def moving(self) -> int:
        """How many choices `end` has."""

    def end(self, choice: int) -> None:
        """Something under way ends, or goes on."""

    def look(self, tensors: Mapping[str, torch.Tensor], layer: int, expert: int) -> None:
        """Computes with what a lease has lent: raises AssertionError where it is not the expert."""

    def close(self) -> None: ...


class _OnTheHost:
    """Computes when it is asked."""

    cache: ExpertCache

    def look(self, tensors: Mapping[str, torch.Tensor], layer: int, expert: int) -> None:
        assert_is(tensors, self.cache.spec, layer, expert)

    def close(self) -> None:
        self.cache.close()


class OneTier(_OnTheHost):
    """RAM slots <- pack."""

    def __init__(
        self,
        pack: Pack,
        slots: int,
        policy: Policy,
        choose: Callable[[int], int],
        *,
        sweeping: bool = False,
    ) -> None:
        self.reader = ManualReader(pack, choose)
        self.failures = self.reader.failures
        plan = plan_slots(slots * pack.spec.slot_bytes, pack.spec, 1)
        self.cache = ExpertCache(pack, plan, policy=policy, reader=self.reader, sweeping=sweeping)

    def here(self) -> set[Key]:
        return set(self.reader.holds.values())

    @property
    def moving(self) -> int:
        return len(self.reader.queued)

    def end(self, choice: int) -> None:
        self.reader.finish(choice)


@dataclass
class Kind:
    """Which two tiers."""

    mode: HostMode
    shown: bool = False  # the device's slots only show the host's


KINDS = {
    "whole, moved": Kind(HostMode.WHOLE),
    "whole, shown": Kind(HostMode.WHOLE, shown=True),
    "inclusive": Kind(HostMode.INCLUSIVE),
    "exclusive": Kind(HostMode.EXCLUSIVE),
}


@dataclass
class Notes:
    """What the link did, noted where bytes land."""

    holds: dict[int, Key] = field(default_factory=dict)  # by device slot: a whole request's
    landed: dict[int, Key] = field(default_factory=dict)  # the others of its request did not, yet
    wanted: dict[int, dict[int, Key]] = field(default_factory=dict)  # by slot: all of its request

    def expect(self, requests: Sequence[ReadRequest]) -> None:
        for request in requests:
            pairs = zip(request.slots, request.experts, strict=True)
            whole = {slot: (request.layer, expert) for slot, expert in pairs}
            for slot in request.slots:
                self.wanted[slot] = whole
                self.holds.pop(slot, None)
                self.landed.pop(slot, None)

    def land(self, slot: int) -> None:
        """A request's experts are here together, when the last one is."""
        whole = self.wanted[slot]
        self.landed[slot] = whole[slot]
        if whole.keys() <= self.landed.keys():
            for each in whole:
                self.holds[each] = self.landed.pop(each)


class TwoTiers(_OnTheHost):
    """Device slots <- host slots <- pack, with a clock for the link."""

    def __init__(
        self,
        pack: Pack,
        slots: int,
        host_slots: int,
        kind: Kind,
        policy: Policy,
        host_policy: Policy,
        choose: Callable[[int], int] = lambda count: 0,
        link: type[EmulatedLink] = EmulatedLink,
    ) -> None:
        self.clock, self.notes = Clock(), Notes()
        self.disk = ManualReader(pack, choose, self.clock.sleep)
        self.failures = self.disk.failures
        self._pack, self._shown, self._link = pack, kind.shown, link
        spec = pack.spec
        if kind.mode is HostMode.WHOLE:
            host_slots = spec.num_experts
        host = plan_slots(host_slots * spec.slot_bytes, spec, 1)
        device = plan_slots(slots * spec.slot_bytes, spec, 1)
        plan = TierPlan(host, device, kind.mode)
        self.cache = two_tiers(
            pack, plan, self._wire, policy=policy, host_policy=host_policy, disk=self.disk
        )
        self.host = self.cache._host
        assert self.host is not None
        submit = self.host.submit

        def noted(requests: Sequence[ReadRequest]) -> None:
            self._spoil(requests)
            self.notes.expect(requests)
            submit(requests)

        self.host.submit = noted  # type: ignore[method-assign]

    def _wire(self, host: SlotArena) -> tuple[Arena, EmulatedLink]:
        spec, slots = self._pack.spec, self._pack.spec.num_experts
        self.arena: AliasArena | SlotArena
        if self._shown:
            self.arena = AliasArena(slots, len(spec.layers))
            land = showing(host, self.arena)
        else:
            kinds = [layer.kinds for layer in spec.layers]
            self.arena = SlotArena(slots, spec.slot_bytes, kinds)
            land = moving(host, self.arena)

        def noted(copy: Copy) -> None:
            land(copy)
            self.notes.land(copy.target)

        self.link = self._link(SPEC, noted, clock=self.clock, sleep=self.clock.sleep)
        return self.arena, self.link

    def _spoil(self, requests: Sequence[ReadRequest]) -> None:
        """Until a copy lands its slot is garbage: whoever looks too early is found out."""
        for slot in (slot for request in requests for slot in request.slots):
            if isinstance(self.arena, AliasArena):
                for views in self.arena.views:
                    views[slot] = {}
            else:
                buffer = self.arena.buffer(slot, self.arena.slot_bytes)
                buffer[:] = GARBAGE * len(buffer)

    def here(self) -> set[Key]:
        return set(self.notes.holds.values())

    @property
    def moving(self) -> int:
        """Reads that may end, and the clock that may turn."""
        return len(self.disk.queued) + bool(self.link._current)

    def end(self, choice: int) -> None:
        if choice < len(self.disk.queued):
            self.disk.finish(choice)
            return
        self.clock.sleep(0.8)
        self.link._advance(self.clock())  # a wire lands its bytes whether or not anybody looks
