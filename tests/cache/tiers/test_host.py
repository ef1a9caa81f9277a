"""Who waits for whom in the host tier, one step at a time."""

from pathlib import Path

import pytest

from moestro.cache import Lru, ReadFailed, ReadRequest
from rigs import KINDS, TwoTiers
from tiny_packs import assert_is, build_tiny, tiny_spec

SPEC = tiny_spec(6, 6, 6)


class Desk:
    """A host tier asked by hand; the n-th request goes into device slot n."""

    def __init__(self, path: Path, host_slots: int) -> None:
        pack = build_tiny(path / "tiny.pack", SPEC)
        self.rig = TwoTiers(pack, 18, host_slots, KINDS["inclusive"], Lru(), Lru())
        assert self.rig.host is not None
        self.host = self.rig.host
        self.asked = 0

    def ask(self, *experts: int, guessed: bool = False) -> None:
        """Of layer 0, each in a request of its own, all in one submission."""
        requests = []
        for expert in experts:
            into = (self.asked,)
            buffers = self.rig.cache._arena.buffers(into, SPEC.layers[0].strides[:1])
            requests.append(ReadRequest(0, range(expert, expert + 1), into, buffers, guessed))
            self.asked += 1
        self.host.submit(requests)
        self.host.check()

    def reading(self) -> list[int]:
        return [expert for request in self.rig.disk.queued for expert in request.experts]

    def poll(self) -> list[int]:
        """Device slots that were filled; their bytes are compared."""
        done = self.host.poll()
        self.host.check()
        for each in done:
            assert each.error is None
            (slot,), (expert,) = each.request.slots, each.request.experts
            assert_is(self.rig.cache._arena.views[0][slot], SPEC, 0, expert)
        return sorted(slot for each in done for slot in each.request.slots)

    def finish(self) -> list[int]:
        """Ends all there is."""
        found: list[int] = []
        while self.rig.moving:
            self.rig.end(0)
            found += self.poll()
        return sorted(found)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, host_slots=3)


def test_what_is_here_is_copied_without_reading(desk: Desk) -> None:
    desk.ask(0, 1)
    assert desk.finish() == [0, 1]
    desk.ask(1)
    assert desk.reading() == []
    assert desk.finish() == [2]
    stats = desk.host.stats()
    assert (stats.hits, stats.misses, stats.demand_reads, stats.link.copies) == (1, 2, 2, 3)


def test_what_is_being_read_is_joined(desk: Desk) -> None:
    desk.ask(0, guessed=True)
    desk.ask(0)
    assert desk.reading() == [0]
    assert desk.finish() == [0, 1]
    assert desk.host.stats().misses == 2


def test_neighbours_of_one_submission_are_one_read(desk: Desk) -> None:
    desk.ask(3, 4, 5)
    assert [request.experts for request in desk.rig.disk.queued] == [range(3, 6)]


def test_who_finds_no_slot_waits_and_demand_goes_first(desk: Desk) -> None:
    desk.ask(0, 1, 2)
    desk.ask(3, guessed=True)
    desk.ask(4)
    desk.rig.disk.finish_all()
    assert desk.poll() == []  # all three slots are read from by copies
    assert desk.reading() == []
    while not desk.reading():
        desk.rig.end(0)
        desk.poll()
    assert desk.reading() == [4]
    assert set(desk.finish()) >= {3, 4}


def test_who_was_found_here_late_is_not_evicted_before_its_copy(desk: Desk) -> None:
    desk.ask(0, 1)
    desk.rig.disk.finish_all()
    desk.poll()
    desk.ask(2)
    desk.ask(3, 2)  # 3 finds no slot; 2, behind it, is still being read
    desk.ask(4, 5, guessed=True)
    desk.rig.disk.finish_all()
    desk.poll()
    desk.rig.clock.sleep(60)  # 0, 1 and 2 are copied; room for 3 leaves 2 where it is
    assert desk.poll() == [0, 1, 2]
    assert desk.finish() == [3, 4, 5, 6]


def test_a_failed_read_fails_all_who_wait_for_it(desk: Desk) -> None:
    desk.ask(0)
    desk.ask(0, guessed=True)
    desk.rig.failures.append(ReadFailed("no"))
    desk.rig.disk.finish()
    failed = desk.host.poll()
    assert [isinstance(each.error, ReadFailed) for each in failed] == [True, True]
    desk.host.check()
    desk.ask(0)
    assert desk.finish() == [2]
