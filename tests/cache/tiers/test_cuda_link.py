"""The way into a GPU's slots, over an imagined GPU: bytes, order, and what is refused."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest
import torch

from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.cache import BlobLayout, Copy
from moestro.cache.tiers.cuda_link import (
    GUESSED_CHUNKS,
    PIECE_BYTES,
    STAGING_BYTES,
    CudaArena,
    CudaLink,
)
from moestro.cache.tiers.link import CHUNK_BYTES
from moestro.cache.tiers.slots import SlotArena
from vector_clocks import Race

DEVICE = torch.device("cuda", 0)
PLACES = STAGING_BYTES // CHUNK_BYTES
ODD_BYTES = CHUNK_BYTES * 3 // 2  # of a piece: it ends inside chunks and inside slots
CHUNK_S = CHUNK_BYTES / 25e9


class Bench:
    """Host slots and device slots of `chunks` chunks and a little; host slot n is full of n + 1."""

    def __init__(
        self, gpu: Gpu, slots: int, chunks: int, link: type[CudaLink], piece_bytes: int
    ) -> None:
        self.cuda = FakeCuda(gpu)
        self.size_bytes = chunks * CHUNK_BYTES + 4096
        layout = BlobLayout.of({"up": ("uint8", (self.size_bytes,))})
        self.host = SlotArena(slots, layout.stride_bytes, [[layout]])
        self.host.flat.view(slots, -1).copy_(torch.arange(1, slots + 1).view(-1, 1))
        self._stack = ExitStack()
        self._stack.enter_context(installed(self.cuda))
        self.arena = CudaArena(slots, layout.stride_bytes, [[layout]], DEVICE)
        self.link = link(self.host, self.arena, piece_bytes)

    def close(self) -> None:
        self.link.close()
        self._stack.close()

    def copy(self, source: int, target: int, *, guessed: bool = False) -> Copy:
        return Copy(0, source, target, self.size_bytes, guessed)

    def drain(self, count: int) -> list[Copy]:
        found: list[Copy] = []
        while len(found) < count:
            found += [each.copy for each in self.link.wait()]
        return found

    def holds(self, slot: int) -> set[int]:
        """As the compute stream finds it; raises what the race detector raises."""
        view: torch.Tensor = self.arena.views[0][slot]["up"]
        return {int(view.min()), int(view.max())}

    def compute(self, slot: int, duration_s: float, seen: list[int]) -> None:
        """Looks at the slot when it ends."""
        view = self.arena.views[0][slot]["up"]
        self.cuda.kernel(
            "compute",
            [view],
            duration_s=duration_s,
            run=lambda: seen.append(int(view[0])),
        )


Open = Callable[..., Bench]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:

        def make(
            gpu: Gpu | None = None,
            slots: int = 3,
            chunks: int = 2,
            link: type[CudaLink] = CudaLink,
            piece_bytes: int = PIECE_BYTES,
        ) -> Bench:
            bench = Bench(gpu or Gpu(), slots, chunks, link, piece_bytes)
            stack.callback(bench.close)
            return bench

        yield make


PINNINGS = {
    "pinned": Gpu(),
    "partly pinned": Gpu(register_all_bytes=2 * ODD_BYTES),
    "pinned staging": Gpu(register_bytes=CHUNK_BYTES),
    "pageable": Gpu(register_bytes=CHUNK_BYTES, pinned_bytes=STAGING_BYTES - 1),
}
each_pinning = pytest.mark.parametrize("name", PINNINGS)


@each_pinning
def test_bytes_are_right_whatever_was_pinned(
    opened: Open, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = opened(PINNINGS[name], chunks=2, piece_bytes=ODD_BYTES)
    bench.link.submit([bench.copy(0, 2), bench.copy(1, 0), bench.copy(2, 1, guessed=True)])
    assert len(bench.drain(3)) == 3
    assert [bench.holds(slot) for slot in range(3)] == [{2}, {3}, {1}]
    stats = bench.link.stats()
    assert stats.name == f"cuda:0, {name}" and not stats.emulated
    assert (stats.copies, stats.copied_bytes) == (3, 3 * bench.size_bytes)
    assert stats.busy_s >= 3 * bench.size_bytes / 25e9
    refusals = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert len(refusals) == (name != "pinned")
    assert all("refused to pin more" in each and "--host-memory" in each for each in refusals)


def test_what_the_system_grants_is_kept_and_the_rest_alone_is_staged(opened: Open) -> None:
    bench = opened(PINNINGS["partly pinned"], piece_bytes=ODD_BYTES)
    assert [size for _, size in bench.cuda.registered] == [ODD_BYTES, ODD_BYTES]
    staged, really = list[int](), bench.link._stage

    def noted(source: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
        staged.append(len(source))
        return really(source, staging)

    bench.link._stage = noted  # type: ignore[method-assign]
    bench.link.submit([bench.copy(slot, slot) for slot in range(3)])
    bench.drain(3)
    assert sum(staged) == 3 * bench.size_bytes - 2 * ODD_BYTES
    assert [bench.holds(slot) for slot in range(3)] == [{1}, {2}, {3}]


def test_what_ended_is_told_once_and_not_before(opened: Open) -> None:
    bench = opened()
    copy = bench.copy(0, 0)
    bench.link.submit([copy])
    assert bench.link.poll() == []
    bench.cuda.timeline.turn(CHUNK_S)
    assert bench.link.poll() == []
    bench.cuda.timeline.turn(2 * CHUNK_S)
    (ended,) = bench.link.poll()
    assert ended.copy is copy
    assert ended.busy_s == pytest.approx(bench.size_bytes / 25e9, rel=0.1)
    assert bench.link.poll() == []
    assert bench.link.due_s() > 0


def test_who_waits_waits_for_what_is_demanded(opened: Open) -> None:
    bench = opened()
    guess, demand = bench.copy(0, 0, guessed=True), bench.copy(1, 1)
    bench.link.submit([demand, guess])
    assert [each.copy for each in bench.link.wait()][0] is demand
    assert bench.drain(1) == [guess]
    bench.link.submit([guess])
    assert bench.drain(1) == [guess]


def test_a_staging_buffer_is_used_again_when_its_chunk_has_crossed(opened: Open) -> None:
    slots = 3
    bench = opened(PINNINGS["pinned staging"], slots, PLACES // 2)
    begun_s = bench.cuda.timeline.now_s
    bench.link.submit([bench.copy(slot, slots - 1 - slot) for slot in range(slots)])
    waited_s = bench.cuda.timeline.now_s - begun_s
    assert waited_s > (slots * (PLACES // 2 + 1) - PLACES - 3) * CHUNK_S  # slots end in a little
    assert len(bench.drain(slots)) == slots
    assert [bench.holds(slot) for slot in range(slots)] == [{3}, {2}, {1}]


@pytest.mark.parametrize("name", ["pinned", "pinned staging"])
def test_a_demanded_expert_waits_for_two_chunks_of_a_guess_and_no_more(
    opened: Open, name: str
) -> None:
    bench = opened(PINNINGS[name], chunks=12)
    guess, demand = bench.copy(0, 0, guessed=True), bench.copy(1, 1)
    bench.link.submit([guess])
    bench.cuda.timeline.turn(CHUNK_S / 2)
    asked_s = bench.cuda.timeline.now_s
    bench.link.submit([demand])
    assert bench.drain(1) == [demand]
    expected_s = (GUESSED_CHUNKS - 0.5) * CHUNK_S + bench.size_bytes / 25e9
    assert bench.cuda.timeline.now_s - asked_s == pytest.approx(expected_s, rel=0.02)
    assert bench.drain(1) == [guess]
    assert [bench.holds(slot) for slot in (0, 1)] == [{1}, {2}]


def test_a_guess_goes_on_when_nothing_is_demanded_and_lasts_as_long_as_it_moves(
    opened: Open,
) -> None:
    bench = opened(chunks=6)
    guess, demand = bench.copy(0, 0, guessed=True), bench.copy(1, 1)
    bench.link.submit([guess, demand])
    assert bench.link.stats().chunks == 7  # of the demanded one alone
    bench.cuda.timeline.turn(1.0)
    assert [each.copy for each in bench.link.poll()] == [demand]
    begun_s = bench.cuda.timeline.now_s
    (ended,) = bench.link.wait()
    assert ended.copy is guess
    assert ended.busy_s == pytest.approx(bench.size_bytes / 25e9, rel=0.05)
    assert bench.cuda.timeline.now_s - begun_s == pytest.approx(ended.busy_s, rel=0.05)


def test_a_copy_waits_for_who_had_the_slots_memory_before(opened: Open) -> None:
    bench = opened()
    bench.cuda.kernel("of another tensor", writes=[bench.arena.flat], duration_s=1.0)
    layout = BlobLayout.of({"up": ("uint8", (4096,))})
    link = CudaLink(SlotArena(1, 4096, [[layout]]), bench.arena)
    link.submit([Copy(0, 0, 0, 4096, False), Copy(0, 0, 1, 4096, True)])
    assert len(link.wait()) == len(link.wait()) == 1
    assert bench.cuda.timeline.now_s > 1.0
    link.close()


class Hasty(CudaLink):
    """Does not wait until a staging buffer's last chunk has crossed."""

    def _stage(self, source: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
        self._staged.clear()
        return super()._stage(source, staging)


def test_a_staging_buffer_used_again_too_early_is_found(opened: Open) -> None:
    bench = opened(PINNINGS["pinned staging"], 3, PLACES // 2, Hasty)
    with pytest.raises(Race, match=r"pinned 0\[0\]: copy_ \(host\) does not wait for copy .* in"):
        bench.link.submit([bench.copy(slot, slot) for slot in range(3)])
    bench.cuda.found = None


def test_a_copy_waits_for_who_last_read_the_slot_and_nobody_else_does(opened: Open) -> None:
    bench, seen = opened(), list[int]()
    bench.link.submit([bench.copy(0, 0), bench.copy(1, 1)])
    bench.drain(2)
    bench.compute(0, 1.0, seen)
    bench.arena.used([0])
    bench.compute(1, 1.0, seen)
    bench.arena.used([1])
    begun_s = bench.cuda.timeline.now_s
    bench.link.submit([bench.copy(2, 0)])
    bench.drain(1)
    assert seen == [1]
    assert bench.cuda.timeline.now_s - begun_s == pytest.approx(1.0, rel=1e-2)
    bench.compute(0, 0.1, seen)
    torch.cuda.synchronize()
    assert seen == [1, 2, 3]


def test_the_length_of_a_copy_is_measured_in_memory_of_its_own(opened: Open) -> None:
    bench = opened()
    bench.link.submit([bench.copy(0, 0)])
    bench.drain(1)
    assert bench.link.copy_s(100 * CHUNK_BYTES) == pytest.approx(100 * CHUNK_S, rel=0.05)
    assert bench.holds(0) == {1}


@each_pinning
def test_closing_waits_for_copies_and_gives_the_host_s_memory_back(opened: Open, name: str) -> None:
    bench = opened(PINNINGS[name], piece_bytes=ODD_BYTES)
    bench.link.submit([bench.copy(0, 0), bench.copy(1, 1, guessed=True)])
    assert bool(bench.cuda.registered) == (name in ("pinned", "partly pinned"))
    bench.link.close()
    assert bench.cuda.registered == []
    assert all(not queue.operations for queue in bench.cuda.timeline.queues)
    bench.link.close()


def test_slots_that_do_not_fit_are_refused_by_torch_s_own_error() -> None:
    with installed(FakeCuda(Gpu(memory_bytes=100))), pytest.raises(torch.OutOfMemoryError):
        CudaArena(2, 4096, [[BlobLayout.of({"up": ("uint8", (4096,))})]], DEVICE)
    arena_of_none: Sequence[memoryview]
    with installed(FakeCuda()):
        arena = CudaArena(2, 4096, [[BlobLayout.of({"up": ("uint8", (4096,))})]], DEVICE)
        arena_of_none = arena.buffers([0, 1], [4096, 4096])
    assert arena_of_none == ()  # nothing but a link fills them
