"""Caches with one fault built in: what the counters do not show, the bytes do.

Each fault is a double of one part, everything else is real. `by check` runs with the counters
compared at every turn; `by contents` looks at nothing but the bytes of what is lent.
"""

import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from moestro.cache import Copied, Copy, EmulatedLink, ExpertKey, Lru, Pack, Phase
from rigs import KINDS, TwoTiers
from tiny_packs import assert_is, build_tiny, tiny_spec

SPEC = tiny_spec(6, 6, 6)


class EarlyLink(EmulatedLink):
    """Says that a copy ended when it has only begun."""

    def submit(self, copies: Sequence[Copy]) -> None:
        super().submit(copies)
        self._ended += [Copied(copy, 0.0) for copy in copies]

    def _end(self, copy: Copy) -> None:
        before = list(self._ended)
        super()._end(copy)
        self._ended = before


class WrongTarget(EmulatedLink):
    """Now and then writes into a slot that is not the one it was given."""

    def _end(self, copy: Copy) -> None:
        super()._end(copy)
        other = Copy(copy.layer, copy.source, max(0, copy.target - 1), copy.size_bytes, False)
        self._really(other)

    _really: Callable[[Copy], None] = staticmethod(lambda copy: None)


def sound(rig: TwoTiers) -> None:
    """No fault: the judge must stay silent."""


def evicts_what_is_needed(rig: TwoTiers) -> None:
    """Room for an event's misses is made among its own residents."""
    residency, table = rig.cache._residency, rig.cache._table
    really = residency.make_room

    def make_room(
        count: int, protected: Collection[ExpertKey], most_victims: int | None = None
    ) -> int:
        pinned, table.pinned = table.pinned, set()
        residency.evict(sorted(pinned)[: max(0, count - table.free)])
        table.pinned = pinned
        return really(count, protected, most_victims)

    residency.make_room = make_room  # type: ignore[method-assign]


def host_slots_are_not_pinned(rig: TwoTiers) -> None:
    """A host slot may be read into while a copy still reads from it."""
    assert rig.host is not None
    rig.host._residency.pin = lambda slot: None  # type: ignore[method-assign]
    rig.host._residency.unpin = lambda slot: None  # type: ignore[method-assign]


def host_slots_are_unpinned_at_once(rig: TwoTiers) -> None:
    """The same, but the pins are counted."""
    assert rig.host is not None
    residency = rig.host._residency
    pin, unpin = residency.pin, residency.unpin

    def pin_and_forget(slot: int) -> None:
        pin(slot)
        unpin(slot)

    residency.pin = pin_and_forget  # type: ignore[method-assign]
    residency.unpin = lambda slot: None  # type: ignore[method-assign]


def writes_over_neighbours(rig: TwoTiers) -> None:
    assert isinstance(rig.link, WrongTarget)
    rig.link._really = rig.link._land


FAULTS: dict[str, tuple[Callable[[TwoTiers], None], type[EmulatedLink], set[str]]] = {
    "an expert of this event is evicted": (evicts_what_is_needed, EmulatedLink, {"check", "bytes"}),
    "a stale host buffer": (host_slots_are_not_pinned, EmulatedLink, {"check", "bytes"}),
    "a host buffer freed early": (
        host_slots_are_unpinned_at_once,
        EmulatedLink,
        {"check", "bytes"},
    ),
    "a device slot overwritten in use": (writes_over_neighbours, WrongTarget, {"bytes"}),
    "a copy reported too early": (sound, EarlyLink, {"bytes"}),
}


def live(
    pack: Pack,
    kind: str,
    link: type[EmulatedLink],
    plant: Callable[[TwoTiers], None],
    *,
    check: bool,
) -> None:
    """A random life of a cache; every expert that is lent is compared, twice."""
    dice = random.Random(7)
    rig = TwoTiers(pack, 4, 2, KINDS[kind], Lru(), Lru(), link=link)
    plant(rig)
    try:
        for turn in range(60):
            layer = turn % 3
            experts = dice.sample(range(6), dice.randint(1, 4))
            with rig.cache.acquire(layer, experts, Phase.DECODE) as lease:
                for expert, tensors in lease:
                    assert_is(tensors, SPEC, layer, expert)
                    if check:
                        rig.cache.check()
                    while rig.moving and dice.random() < 0.5:
                        rig.end(dice.randrange(rig.moving))
                    assert_is(tensors, SPEC, layer, expert)
            if check:
                rig.cache.check()
    finally:
        rig.cache.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link", [EmulatedLink, WrongTarget])
def test_a_sound_cache_lives_on(tmp_path: Path, kind: str, link: type[EmulatedLink]) -> None:
    live(build_tiny(tmp_path / "tiny.pack", SPEC), kind, link, sound, check=True)


CASES = [
    pytest.param(fault, kind, judge, id=f"{fault}, {kind}, by {judge}")
    for fault, (_, _, judges) in FAULTS.items()
    for kind in KINDS
    for judge in sorted(judges)
    # Where nobody leaves the host tier, a missing pin does no harm; the counters still tell.
    if not ("host buffer" in fault and kind.startswith("whole") and judge == "bytes")
]


@pytest.mark.parametrize(("fault", "kind", "judge"), CASES)
def test_a_planted_fault_is_found(tmp_path: Path, kind: str, fault: str, judge: str) -> None:
    plant, link, _ = FAULTS[fault]
    pack = build_tiny(tmp_path / "tiny.pack", SPEC)
    with pytest.raises(AssertionError):
        live(pack, kind, link, plant, check=judge == "check")
