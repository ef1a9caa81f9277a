"""The reader over the kernel's queue, where it differs from threads; the rest is the contract."""

import errno
from collections.abc import Sequence

import pytest

from moestro.cache import Completion, DirectReader, Pack, PackSpec, ReadFailed, ReadRequest
from moestro.cache.pack import ReadQueue, page_memory
from moestro.cache.tiers import QueuedReader, pack_reader, queued_reader

Reads = Sequence[tuple[int, int, Sequence[memoryview]]]


class HeldQueue:
    """A queue whose reads end when the test says so, and how; nothing is really read."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.reads: list[tuple[int, int]] = []  # place and offset, as they began
        self.ready: list[tuple[int, int]] = []
        self.takes = depth  # reads that are accepted before one is refused

    @property
    def under_way(self) -> int:
        return len(self.reads)

    def begin(self, descriptor: int, reads: Reads) -> None:
        for place, offset, buffers in reads:
            if not self.takes:
                raise OSError(errno.EAGAIN, "full")
            self.takes -= 1
            self.reads.append((place, offset))
            self.ready.append((place, sum(map(len, buffers))))

    def ended(self, least: int = 0, most_s: float | None = None) -> list[tuple[int, int]]:
        ended, self.ready = self.ready[:1], self.ready[1:]
        for place, _ in ended:
            self.reads = [each for each in self.reads if each[0] != place]
        return ended

    def close(self) -> None:
        pass


def ask(spec: PackSpec, layer: int, expert: int, *, guessed: bool = False) -> ReadRequest:
    stride = spec.layers[layer].layout.stride_bytes
    buffer = memoryview(page_memory(stride))
    return ReadRequest(layer, range(expert, expert + 1), (expert,), (buffer,), guessed)


def over(pack: Pack, queue: HeldQueue) -> QueuedReader:
    return QueuedReader(pack, queue)  # type: ignore[arg-type]


def test_demand_goes_before_guesses_and_finds_room(
    pack: Pack, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = HeldQueue(4)
    monkeypatch.setattr(queued_reader, "MOST_GUESSED", 2)
    reader = over(pack, queue)
    reader.submit([ask(spec, 0, expert, guessed=True) for expert in range(4)])
    assert queue.under_way == 2, "the rest of the queue is left to who is demanded"
    reader.submit([ask(spec, 1, expert) for expert in range(3)])
    began = [offset for _, offset in queue.reads]
    assert began[2:] == [pack.offset(1, 0), pack.offset(1, 1)]
    queue.takes = 99
    done: list[Completion] = []
    while len(done) < 7:
        done += reader.wait()
    assert [each.request.layer for each in done] == [0, 0, 1, 1, 1, 0, 0]


def test_what_the_queue_refuses_is_read_at_once(pack: Pack, spec: PackSpec) -> None:
    queue = HeldQueue(4)
    queue.takes = 1
    reader = over(pack, queue)
    asked = [ask(spec, 0, expert) for expert in range(3)]
    reader.submit(asked)
    done = reader.poll()
    while len(done) < 3:
        done += reader.wait()
    assert {id(each.request) for each in done} == {id(each) for each in asked}
    assert all(each.error is None for each in done)
    for each in asked[1:]:  # the first one's bytes are the fake's: none
        offset, buffer = pack.offset(0, each.experts[0]), each.buffers[0]
        assert bytes(buffer) == pack.path.read_bytes()[offset : offset + len(buffer)]


@pytest.mark.parametrize("got", [-errno.EIO, -errno.EINVAL, 0, 4096])
def test_what_ends_short_is_read_again(pack: Pack, spec: PackSpec, got: int) -> None:
    queue = HeldQueue(4)
    reader = over(pack, queue)
    wanted = ask(spec, 2, 3)
    reader.submit([wanted])
    queue.ready = [(place, got) for place, _ in queue.ready]
    (done,) = reader.wait()
    assert done.error is None
    offset, buffer = pack.offset(2, 3), wanted.buffers[0]
    assert bytes(buffer) == pack.path.read_bytes()[offset : offset + len(buffer)]


def test_what_cannot_be_read_again_fails(pack: Pack) -> None:
    queue = HeldQueue(4)
    reader = over(pack, queue)
    beyond = ReadRequest(2, range(5, 6), (0,), (memoryview(page_memory(1 << 20)),), False)
    reader.submit([beyond])
    queue.ready = [(place, 4096) for place, _ in queue.ready]
    (done,) = reader.wait()
    assert isinstance(done.error, ReadFailed)
    assert "ends early" in str(done.error)


def test_small_experts_are_queued_where_there_is_a_queue(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pack.direct:
        pytest.skip("no direct reads on this file system")
    monkeypatch.setattr(queued_reader, "ReadQueue", HeldQueue)
    queued = pack_reader(pack)
    assert isinstance(queued, QueuedReader)
    monkeypatch.setattr(queued_reader, "SMALL_BYTES", pack.spec.slot_bytes - 1)
    threads = pack_reader(pack)
    assert isinstance(threads, DirectReader)
    threads.close()


def test_without_a_queue_threads_read(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(depth: int) -> ReadQueue:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(queued_reader, "ReadQueue", refused)
    reader = pack_reader(pack)
    assert isinstance(reader, DirectReader)
    reader.close()
