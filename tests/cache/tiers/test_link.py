"""The emulated link's clock, and who goes first on it. What every link promises to a reader is in
test_reader_contract.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.cache import Copy, EmulatedLink, LinkSpec
from moestro.cache.tiers.link import CHUNK_BYTES
from rigs import Clock

MB = 1_000_000


class Bench:
    """A link of 1 MB/s whose landings are noted with their time."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.clock = Clock()
        self.landed: list[tuple[int, float]] = []
        spec = LinkSpec(MB, latency_s)
        self.link = EmulatedLink(spec, self._land, clock=self.clock, sleep=self.clock.sleep)

    def _land(self, copy: Copy) -> None:
        self.landed.append((copy.source, self.clock.now_s))

    def copies(self, *sizes: int, guessed: bool = False, first: int = 0) -> list[Copy]:
        return [Copy(0, first + i, first + i, size, guessed) for i, size in enumerate(sizes)]

    def drain(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            found += [ended.copy.source for ended in self.link.wait()]
        return found


def test_copies_end_one_after_another_each_after_latency_and_size() -> None:
    made = Bench(latency_s=0.5)
    made.link.submit(made.copies(MB, 2 * MB))
    assert made.link.poll() == []
    assert made.link.due_s() == pytest.approx(1.5)
    assert made.drain(2) == [0, 1]
    assert [when for _, when in made.landed] == pytest.approx([1.5, 4.0])
    stats = made.link.stats()
    assert (stats.copies, stats.copied_bytes, stats.chunks) == (2, 3 * MB, 2)
    assert stats.busy_s == pytest.approx(4.0)
    assert stats.emulated and "emulated" in stats.name


def test_a_link_that_stood_idle_begins_at_once() -> None:
    made = Bench()
    made.link.submit(made.copies(MB))
    made.clock.now_s = 10.0
    assert [ended.busy_s for ended in made.link.poll()] == [pytest.approx(1.0)]
    made.link.submit(made.copies(MB))
    assert made.link.due_s() == pytest.approx(1.0)


def test_nothing_lands_early() -> None:
    made = Bench()
    made.link.submit(made.copies(MB))
    made.clock.now_s = 0.999
    assert made.link.poll() == [] and made.landed == []


def test_what_is_demanded_waits_for_a_chunk_not_for_a_whole_guess() -> None:
    made = Bench()
    made.link.submit(made.copies(10 * CHUNK_BYTES, guessed=True))
    made.clock.now_s = 0.1
    made.link.submit(made.copies(MB, first=7))
    assert made.link.due_s() == pytest.approx((CHUNK_BYTES + MB) / MB - 0.1)
    assert made.drain(2) == [7, 0]
    (_, demanded_s), (_, guessed_s) = made.landed
    assert demanded_s == pytest.approx((CHUNK_BYTES + MB) / MB)
    assert guessed_s == pytest.approx((10 * CHUNK_BYTES + MB) / MB)
    assert made.link.stats().chunks == 11


def test_closing_drops_what_is_under_way() -> None:
    made = Bench()
    made.link.submit(made.copies(MB))
    made.link.close()
    made.clock.now_s = 9.0
    assert made.link.poll() == [] and made.landed == []


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5 * CHUNK_BYTES), st.booleans()), max_size=8),
    pauses=st.lists(st.floats(0, 4), max_size=20),
)
def test_no_order_of_asking_makes_the_link_faster_or_idle(
    sizes: list[tuple[int, bool]], pauses: list[float]
) -> None:
    """All submitted at once: the last one ends when all bytes have passed, however it is polled."""
    made, ended = Bench(latency_s=0.125), 0
    for place, (size, guessed) in enumerate(sizes):
        made.link.submit(made.copies(size, guessed=guessed, first=place))
    for pause in pauses:
        made.clock.now_s += pause
        ended += len(made.link.poll())
    if ended < len(sizes):
        made.drain(len(sizes) - ended)
        total = sum(size for size, _ in sizes) / MB + 0.125 * len(sizes)
        assert made.clock.now_s == pytest.approx(total, abs=1e-6)
    demanded = [guessed for source, _ in made.landed for guessed in [sizes[source][1]]]
    assert demanded[1:] == sorted(demanded[1:]) if demanded else True


@pytest.mark.parametrize("wrong", [(0, 0), (-1, 0), (float("inf"), 0), (1, -1), (1, float("nan"))])
def test_a_link_that_cannot_be_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not"):
        LinkSpec(*wrong)
