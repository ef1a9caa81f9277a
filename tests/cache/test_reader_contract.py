"""What every reader promises: from the pack, from a host tier in each mode, over each link.

Real files, real threads, real clocks; nothing here asks how long anything took.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from manual_reader import ManualReader
from moestro.cache import (
    Completion,
    DirectReader,
    ExpertCache,
    HostMode,
    LinkSpec,
    Pack,
    Phase,
    ReadFailed,
    ReadRequest,
    TierPlan,
    cuda,
    plan_slots,
    two_tiers,
)
from moestro.cache.pack import ReadQueue
from moestro.cache.tiers import QueuedReader, TierReader
from moestro.cache.tiers.link import EmulatedLink
from moestro.cache.tiers.slots import AliasArena, Arena, SlotArena
from moestro.cache.tiers.wiring import moving, showing
from tiny_packs import assert_is, build_tiny, tiny_spec

SPEC = tiny_spec(6, 6, 6)
FAST = LinkSpec(1e10, 1e-6)
Open = Callable[[Pack], AbstractContextManager[ExpertCache]]


def closing(make: Callable[[Pack], ExpertCache]) -> Open:
    @contextmanager
    def opened(pack: Pack) -> Iterator[ExpertCache]:
        cache = make(pack)
        yield cache
        cache.close()
        cache.close()

    return opened


def slots(count: int):
    return plan_slots(count * SPEC.slot_bytes, SPEC, 1)


def one_tier(threads: int) -> Open:
    return closing(lambda pack: ExpertCache(pack, slots(18), reader=DirectReader(pack, threads)))


def queued() -> Open:
    def opened(pack: Pack) -> ExpertCache:
        try:
            return ExpertCache(pack, slots(18), reader=QueuedReader(pack, ReadQueue(3)))
        except OSError as error:
            pack.close()
            pytest.skip(f"no queue of the kernel's here: {error}")

    return closing(opened)


def fake() -> Open:
    return closing(lambda pack: ExpertCache(pack, slots(18), reader=ManualReader(pack)))


def tiers(mode: HostMode, host_slots: int, *, shown: bool = False) -> Open:
    def wire(host: SlotArena) -> tuple[Arena, EmulatedLink]:
        if shown:
            alias = AliasArena(18, 3)
            return alias, EmulatedLink(FAST, showing(host, alias))
        kinds = [layer.kinds for layer in SPEC.layers]
        arena = SlotArena(18, SPEC.slot_bytes, kinds)
        return arena, EmulatedLink(FAST, moving(host, arena))

    plan = TierPlan(slots(host_slots), slots(18), mode)
    return closing(lambda pack: two_tiers(pack, plan, wire))


def on_gpu(mode: HostMode, host_slots: int) -> Open:
    plan = TierPlan(slots(host_slots), slots(18), mode)
    return closing(lambda pack: two_tiers(pack, plan, cuda(torch.device("cuda", 0), pack, plan)))


def on_imagined_gpu(mode: HostMode, host_slots: int, gpu: Gpu) -> Open:
    @contextmanager
    def opened(pack: Pack) -> Iterator[ExpertCache]:
        with installed(FakeCuda(gpu)), on_gpu(mode, host_slots)(pack) as cache:
            yield cache

    return opened


GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)
READERS = {
    "pack": one_tier(1),
    "pack, three threads": one_tier(3),
    "pack, the kernel's queue": queued(),
    "fake": fake(),
    "whole, moved": tiers(HostMode.WHOLE, 18),
    "whole, shown": tiers(HostMode.WHOLE, 18, shown=True),
    "inclusive": tiers(HostMode.INCLUSIVE, 4),
    "inclusive, one slot": tiers(HostMode.INCLUSIVE, 1),
    "exclusive": tiers(HostMode.EXCLUSIVE, 4),
    "imagined gpu, whole": on_imagined_gpu(HostMode.WHOLE, 18, Gpu()),
    "imagined gpu, exclusive": on_imagined_gpu(HostMode.EXCLUSIVE, 4, Gpu()),
    "imagined gpu, staged": on_imagined_gpu(HostMode.INCLUSIVE, 4, Gpu(register_bytes=0)),
    "imagined gpu, pageable": on_imagined_gpu(
        HostMode.INCLUSIVE, 4, Gpu(register_bytes=0, pinned_bytes=0)
    ),
}
GPU_READERS = {
    "gpu, whole": on_gpu(HostMode.WHOLE, 18),
    "gpu, inclusive": on_gpu(HostMode.INCLUSIVE, 4),
    "gpu, exclusive": on_gpu(HostMode.EXCLUSIVE, 4),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packs") / "tiny.pack"


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(make, id=name) for name, make in READERS.items()),
        *(pytest.param(make, id=name, marks=GPU) for name, make in GPU_READERS.items()),
    ],
)
def cache(request: pytest.FixtureRequest, path: Path) -> Iterator[ExpertCache]:
    make: Open = request.param
    with make(build_tiny(path, SPEC)) as cache:
        yield cache


def ask(
    cache: ExpertCache, layer: int, experts: range, into: Sequence[int], guessed: bool = False
) -> ReadRequest:
    sizes = SPEC.layers[layer].strides[experts.start : experts.stop]
    for expert, slot in zip(experts, into, strict=True):
        cache._arena.show(layer, slot, SPEC.layers[layer].layout_of(expert))
    return ReadRequest(layer, experts, tuple(into), cache._arena.buffers(into, sizes), guessed)


def collect(cache: ExpertCache, requests: Sequence[ReadRequest]) -> list[Completion]:
    """Submits, checks the counters at every turn, and waits for all of it."""
    reader, done = cache._loader._reader, list[Completion]()
    reader.submit(requests)
    while len(done) < len(requests):
        done += reader.poll()
        check(cache)
        if len(done) < len(requests):
            done += reader.wait()
        check(cache)
    assert {id(each.request) for each in done} == {id(each) for each in requests}
    assert reader.poll() == []
    return done


def check(cache: ExpertCache) -> None:
    if cache._host is not None:
        cache._host.check()


def assert_there(cache: ExpertCache, done: Sequence[Completion]) -> None:
    for each in done:
        assert each.error is None
        assert each.read_s >= 0
        for expert, slot in zip(each.request.experts, each.request.slots, strict=True):
            views = cache._arena.views[each.request.layer][slot]
            assert_is(views, SPEC, each.request.layer, expert)


def test_many_at_once(cache: ExpertCache) -> None:
    asked = [
        ask(cache, layer, range(first, first + 3), range(layer * 6 + first, layer * 6 + first + 3))
        for layer in range(3)
        for first in (0, 3)
    ]
    assert_there(cache, collect(cache, asked))


def test_one_expert_into_several_slots(cache: ExpertCache) -> None:
    asked = [ask(cache, 1, range(2, 4), (place, place + 1)) for place in (0, 5, 9)]
    assert_there(cache, collect(cache, asked))


REQUESTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 3), st.booleans()), max_size=5
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(REQUESTS, max_size=4))
def test_any_batches(cache: ExpertCache, batches: list[list[tuple[int, int, int, bool]]]) -> None:
    for batch in batches:
        place, asked = 0, list[ReadRequest]()
        for layer, first, count, guessed in batch:
            experts = range(first, min(6, first + count))
            asked.append(ask(cache, layer, experts, range(place, place + len(experts)), guessed))
            place += len(experts)
        assert_there(cache, collect(cache, asked))


def test_a_refused_read_fails_its_request_and_no_other(
    cache: ExpertCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cache._host is not None and cache._host.stats().mode == HostMode.WHOLE.value:
        pytest.skip("by now, nothing is read any more")
    pack, really = cache._pack, cache._pack.file.read_into

    def refusing(offset: int, buffers: Sequence[memoryview]) -> None:
        if offset == pack.offset(2, 4):
            raise ReadFailed("no")
        really(offset, buffers)

    collect(cache, [ask(cache, 0, range(6), range(6))])  # a small host tier forgets the others
    asked = [ask(cache, 2, range(4, 5), (0,)), ask(cache, 1, range(2), (1, 2))]
    with monkeypatch.context() as patched:
        patched.setattr(pack.file, "read_into", refusing)
        reader = cache._loader._reader
        disk = reader._disk if isinstance(reader, TierReader) else reader
        if isinstance(disk, QueuedReader):  # what ends ill there is read again
            patched.setattr(disk._queue, "ended", nothing_read(disk))
        if isinstance(cache._loader._reader, ManualReader):
            cache._loader._reader.failures.append(ReadFailed("no"))
        done = {each.request.layer: each for each in collect(cache, asked)}
    assert isinstance(done[2].error, ReadFailed)
    assert_there(cache, [done[1]])
    assert_there(cache, collect(cache, [ask(cache, 2, range(4, 5), (0,))]))


def nothing_read(reader: QueuedReader) -> Callable[[int, float | None], list[tuple[int, int]]]:
    """What ends of its queue, where all reads of layer 2 end with EIO."""
    really = reader._queue.ended

    def ended(least: int, most_s: float | None) -> list[tuple[int, int]]:
        layers = {place: request.layer for place, (request, _) in reader._reading.items()}
        found = really(least, most_s)
        return [(place, -errno.EIO if layers[place] == 2 else got) for place, got in found]

    return ended


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in READERS.items()),
        *(pytest.param(make, id=name, marks=GPU) for name, make in GPU_READERS.items()),
    ],
)
def test_closing_with_work_under_way(path: Path, make: Open) -> None:
    with make(build_tiny(path, SPEC)) as cache:
        first, second = ask(cache, 0, range(6), range(6)), ask(cache, 1, range(6), range(6, 12))
        cache._loader._reader.submit([first, second])


def test_how_long_a_slot_takes_is_known(cache: ExpertCache) -> None:
    taken = cache.time_reads(0.01)
    assert taken and min(taken) > 0
    check(cache)


def test_a_whole_life(cache: ExpertCache) -> None:
    """Through the front door, with the free events of a device in play."""
    for turn in range(30):
        layer = turn % 3
        with cache.acquire(layer, [turn % 6, (turn + 2) % 6], Phase.DECODE) as lease:
            for expert, tensors in lease:
                assert_is(tensors, SPEC, layer, expert)
        cache.prefetch((layer + 1) % 3, [turn % 5], 1)
        cache.check()
