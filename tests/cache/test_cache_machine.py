"""Any order of calls, of arrivals and of failures: the counters agree after each of them.

One contract for every tier, every mode of the host tier and every policy. The judge is the rig's
own note of which slot's bytes are whose, kept apart from the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cuda_rig import SLOW, OnGpu
from fake_cuda_facts import Gpu
from moestro.cache import (
    ComputeBelow,
    DecayedFrequency,
    HostMode,
    Lease,
    Lru,
    NextUse,
    Pack,
    PackSpec,
    PerLayer,
    Phase,
    Policy,
    ReadFailed,
    Routed,
)
from rigs import KINDS, Kind, OneTier, Rig, TwoTiers
from tiny_packs import build_tiny, mixed_spec, tiny_spec

LAYERS = st.integers(0, 2)
EXPERTS = st.lists(st.integers(0, 5), unique=True, max_size=6)
POLICIES: st.SearchStrategy[Callable[[], Policy]] = st.sampled_from(
    [NextUse, Lru, DecayedFrequency, lambda: PerLayer(Lru)]
)
SPEC, MIXED = tiny_spec(6, 6, 6), mixed_spec(6, 6, 6)


class CacheMachine(RuleBasedStateMachine):
    path: ClassVar[Path]
    spec: ClassVar[PackSpec] = SPEC
    lease: Lease | None = None

    @initialize(
        slots=st.sampled_from([1, 2, 3, 5, 9, 15, 18]),
        first=st.booleans(),
        policy=POLICIES,
        data=st.data(),
    )
    def start(
        self, slots: int, first: bool, policy: Callable[[], Policy], data: st.DataObject
    ) -> None:
        pack = build_tiny(self.path, self.spec)  # opened, after the first time
        self.rig = self.make(pack, slots, policy(), lambda count: 0 if first else count - 1, data)
        self.cache = self.rig.cache
        self.requested = self.hits = 0

    def make(
        self,
        pack: Pack,
        slots: int,
        policy: Policy,
        choose: Callable[[int], int],
        data: st.DataObject,
    ) -> Rig:
        return OneTier(pack, slots, policy, choose, sweeping=data.draw(st.booleans()))

    @precondition(lambda self: self.lease is None)
    @rule(
        layer=LAYERS,
        experts=EXPERTS,
        phase=st.sampled_from(Phase),
        compute_below=st.sampled_from(
            [None, None, lambda _, below: below, lambda _, below: min(below, 1)]
        ),
        data=st.data(),
    )
    def acquire(
        self,
        layer: int,
        experts: list[int],
        phase: Phase,
        compute_below: ComputeBelow | None,
        data: st.DataObject,
    ) -> None:
        # What was read but not collected yet counts as here: acquire collects first.
        here = self.here()
        counts = st.tuples(*[st.integers(1, 9)] * len(experts))
        routed = data.draw(st.none() | counts.map(lambda drawn: Routed(9, drawn)))
        routed = routed if phase is Phase.PREFILL else None
        self.lease = self.cache.acquire(layer, experts, phase, routed, compute_below)
        self.layer, self.experts, self.yielded = layer, experts, list[int]()
        self.turns: Iterator[tuple[int, dict[str, torch.Tensor]]] = iter(self.lease)
        self.requested += len(experts)
        self.hits += sum((layer, expert) in here for expert in experts)

    @precondition(lambda self: self.lease is not None)
    @rule()
    def take_next(self) -> None:
        try:
            expert, tensors = next(self.turns)
        except StopIteration:
            assert sorted(self.yielded) == sorted(self.experts)
            self.leave()
        except ReadFailed:
            self.leave()
        else:
            self.rig.look(tensors, self.layer, expert)
            assert expert not in self.yielded
            self.yielded.append(expert)

    @precondition(lambda self: self.lease is not None)
    @rule()
    def leave(self) -> None:
        assert self.lease is not None
        self.lease.__exit__(None, None, None)
        self.lease = None
        assert all(request.guessed for request in self.cache._loader._under_way)

    @rule(layer=LAYERS, experts=EXPERTS, phase=st.sampled_from(Phase))
    def resident(self, layer: int, experts: list[int], phase: Phase) -> None:
        known = {(layer, expert) for expert in range(6)} <= self.here()
        views = self.cache.resident(layer, experts, phase)
        if views is None:
            return
        assert known and self.lease is None and self.cache.plan.holds_all
        for expert, tensors in enumerate(views):
            self.rig.look(tensors, layer, expert)
        self.requested += len(experts)
        self.hits += len(experts)

    @rule(layer=LAYERS, experts=EXPERTS, phase=st.sampled_from(Phase))
    def swept(self, layer: int, experts: list[int], phase: Phase) -> None:
        known = {(layer, expert) for expert in experts} <= self.here()
        views = self.cache.swept(layer, experts, phase)
        if views is None:
            return
        assert known and self.lease is None and self.cache.sweeping
        assert list(views) == experts
        for expert, tensors in views.items():
            self.rig.look(tensors, layer, expert)
        self.requested += len(experts)
        self.hits += len(experts)

    @precondition(lambda self: self.lease is None)
    @rule(data=st.data())
    def step_of_many(self, data: st.DataObject) -> None:
        """All layers ask for all: the next such step sweeps, where there are slots for it."""
        for layer in range(3):
            self.swept(layer, [*range(6)], Phase.DECODE)
            self.acquire(layer, [*range(6)], Phase.DECODE, None, data)
            while self.lease is not None:
                self.take_next()
            self.books_agree()

    @rule(layer=LAYERS, requested=st.integers(0, 6))
    def follow_prompt(self, layer: int, requested: int) -> None:
        before, kept = self.here(), set(self.cache._policy.keys())
        begun = self.cache.follow_prompt(layer, requested)
        assert kept == set(self.cache._policy.keys())
        if begun:
            assert self.lease is None and layer < 2 and requested >= 4
            moving = self.cache._loader._under_way
            assert moving and all(each.guessed and each.layer == layer + 1 for each in moving)
            assert all(gone not in kept for gone in before - self.here())

    @rule(layer=LAYERS, experts=EXPERTS, limit=st.integers(0, 3))
    def prefetch(self, layer: int, experts: list[int], limit: int) -> None:
        staying = self.here() & ({(layer, expert) for expert in experts} | self.pinned())
        started = self.cache.prefetch(layer, experts, limit)
        assert started <= min(limit, len(experts))
        assert staying <= self.here()

    @precondition(lambda self: self.rig.moving)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.rig.end(data.draw(st.integers(0, self.rig.moving - 1)))

    @precondition(lambda self: not self.rig.failures)
    @rule()
    def fail_next_read(self) -> None:
        self.rig.failures.append(ReadFailed("the disk said no"))

    @invariant()
    def books_agree(self) -> None:
        self.cache.check()
        stats = self.cache.stats()
        assert stats.lookups == self.requested
        assert stats.hits + stats.prefetch_hits == self.hits
        assert stats.used_bytes <= stats.capacity_bytes

    def here(self) -> set[tuple[int, int]]:
        """Whose bytes are whole, by the rig's note, and known to the cache."""
        return self.rig.here() & {key for key in self.cache._table.keys if key is not None}

    def pinned(self) -> set[tuple[int, int]]:
        table = self.cache._table
        return {key for slot in table.pinned if (key := table.keys[slot]) is not None}

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()


def machine_of(spec: PackSpec, kind: Kind) -> type[CacheMachine]:
    """The same over two tiers."""
    given = spec

    class Machine(CacheMachine):
        spec = given

        def make(
            self,
            pack: Pack,
            slots: int,
            policy: Policy,
            choose: Callable[[int], int],
            data: st.DataObject,
        ) -> Rig:
            host_slots = data.draw(st.sampled_from([1, 2, 3, 6, 12]))
            host_policy = data.draw(POLICIES)()
            return TwoTiers(pack, slots, host_slots, kind, policy, host_policy, choose)

    return Machine


def machine_on_gpu(spec: PackSpec, mode: HostMode, gpu: Gpu) -> type[CacheMachine]:
    """The same over an imagined GPU: no byte is read while it may be written, or before it is."""
    given = spec

    class Machine(CacheMachine):
        spec = given

        def make(
            self,
            pack: Pack,
            slots: int,
            policy: Policy,
            choose: Callable[[int], int],
            data: st.DataObject,
        ) -> Rig:
            host_slots = data.draw(st.sampled_from([1, 2, 3, 6, 12]))
            host_policy = data.draw(POLICIES)()
            return OnGpu(pack, slots, host_slots, mode, policy, host_policy, choose, gpu)

    return Machine


class MixedMachine(CacheMachine):
    """Experts of a layer differ in size, and slots take any of them."""

    spec = MIXED


@pytest.fixture(autouse=True)
def pack_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheMachine, "path", tmp_path / "tiny.pack", raising=False)


def case(machine: type[CacheMachine], examples: int) -> Any:
    found = machine.TestCase
    found.settings = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    return found


TestOneTier = case(CacheMachine, 150)
TestMixed = case(MixedMachine, 50)
TestWhole = case(machine_of(SPEC, KINDS["whole, moved"]), 60)
TestWholeMixed = case(machine_of(MIXED, KINDS["whole, moved"]), 30)
TestWholeShown = case(machine_of(SPEC, KINDS["whole, shown"]), 60)
TestWholeShownMixed = case(machine_of(MIXED, KINDS["whole, shown"]), 30)
TestInclusive = case(machine_of(SPEC, KINDS["inclusive"]), 100)
TestInclusiveMixed = case(machine_of(MIXED, KINDS["inclusive"]), 30)
TestExclusive = case(machine_of(SPEC, KINDS["exclusive"]), 100)
TestExclusiveMixed = case(machine_of(MIXED, KINDS["exclusive"]), 30)
TestGpuWhole = case(machine_on_gpu(SPEC, HostMode.WHOLE, SLOW), 12)
TestGpuInclusive = case(machine_on_gpu(SPEC, HostMode.INCLUSIVE, SLOW), 25)
TestGpuInclusiveMixed = case(machine_on_gpu(MIXED, HostMode.INCLUSIVE, SLOW), 10)
TestGpuExclusive = case(machine_on_gpu(SPEC, HostMode.EXCLUSIVE, SLOW), 25)
TestGpuStaged = case(machine_on_gpu(SPEC, HostMode.INCLUSIVE, replace(SLOW, register_bytes=0)), 10)
