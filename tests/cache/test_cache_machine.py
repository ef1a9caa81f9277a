"""Any order of calls, of arrivals and of failures: the books agree after each of them.

The judge is the reader's own note of which slot's bytes are whose, kept apart from the cache.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

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

from manual_reader import ManualReader
from moestro.cache import (
    ExpertCache,
    Lease,
    Lru,
    NextUse,
    PackSpec,
    PerLayer,
    Phase,
    Policy,
    ReadFailed,
    Routed,
    plan_slots,
)
from tiny_packs import assert_is, build_tiny, mixed_spec, tiny_spec

LAYERS = st.integers(0, 2)
EXPERTS = st.lists(st.integers(0, 5), unique=True, max_size=6)
POLICIES = st.sampled_from([NextUse, Lru, lambda: PerLayer(Lru)])


class CacheMachine(RuleBasedStateMachine):
    path: ClassVar[Path]
    spec: ClassVar[PackSpec] = tiny_spec(6, 6, 6)
    lease: Lease | None = None

    @initialize(slots=st.sampled_from([1, 2, 3, 5, 9, 18]), first=st.booleans(), policy=POLICIES)
    def start(self, slots: int, first: bool, policy: Callable[[], Policy]) -> None:
        self.pack = build_tiny(self.path, self.spec)  # opened, after the first time
        self.reader = ManualReader(self.pack, lambda count: 0 if first else count - 1)
        plan = plan_slots(slots * self.spec.slot_bytes, self.spec, 1)
        self.cache = ExpertCache(self.pack, plan, policy=policy(), reader=self.reader)
        self.requested = self.hits = 0

    @precondition(lambda self: self.lease is None)
    @rule(layer=LAYERS, experts=EXPERTS, phase=st.sampled_from(Phase), data=st.data())
    def acquire(self, layer: int, experts: list[int], phase: Phase, data: st.DataObject) -> None:
        # What was read but not collected yet counts as here: acquire collects first.
        here = self.here()
        counts = st.tuples(*[st.integers(1, 9)] * len(experts))
        routed = data.draw(st.none() | counts.map(lambda drawn: Routed(9, drawn)))
        routed = routed if phase is Phase.PREFILL else None
        self.lease = self.cache.acquire(layer, experts, phase, routed)
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
            assert_is(tensors, self.spec, self.layer, expert)
            assert expert not in self.yielded
            self.yielded.append(expert)

    @precondition(lambda self: self.lease is not None)
    @rule()
    def leave(self) -> None:
        assert self.lease is not None
        self.lease.__exit__(None, None, None)
        self.lease = None
        assert all(request.guessed for request in self.reader.queued)

    @rule(layer=LAYERS, experts=EXPERTS, limit=st.integers(0, 3))
    def prefetch(self, layer: int, experts: list[int], limit: int) -> None:
        staying = self.here() & ({(layer, expert) for expert in experts} | self.pinned())
        started = self.cache.prefetch(layer, experts, limit)
        assert started <= min(limit, len(experts))
        assert staying <= self.here()

    @precondition(lambda self: self.reader.queued)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.reader.finish(data.draw(st.integers(0, len(self.reader.queued) - 1)))

    @precondition(lambda self: not self.reader.failures)
    @rule()
    def fail_next_read(self) -> None:
        self.reader.failures.append(ReadFailed("the disk said no"))

    @invariant()
    def books_agree(self) -> None:
        self.cache.check()
        stats = self.cache.stats()
        assert stats.lookups == self.requested
        assert stats.hits + stats.prefetch_hits == self.hits
        assert stats.used_bytes <= stats.capacity_bytes

    def here(self) -> set[tuple[int, int]]:
        """Whose bytes are whole, by the reader's note, and known to the cache."""
        return set(self.reader.holds.values()) & set(self.cache._policy.keys())

    def pinned(self) -> set[tuple[int, int]]:
        table = self.cache._table
        return {key for slot in table.pinned if (key := table.keys[slot]) is not None}

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()


class MixedMachine(CacheMachine):
    """Experts of a layer differ in size, and slots take any of them."""

    spec = mixed_spec(6, 6, 6)


@pytest.fixture(autouse=True)
def pack_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheMachine, "path", tmp_path / "tiny.pack", raising=False)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

TestMixed = MixedMachine.TestCase
TestMixed.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
