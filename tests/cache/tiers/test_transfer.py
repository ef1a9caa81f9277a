import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from moestro.cache import (
    Completion,
    DirectReader,
    ExpertCache,
    Pack,
    PackInvalid,
    PackSpec,
    ReadFailed,
    ReadRequest,
)
from moestro.cache.pack import ReadQueue
from moestro.cache.pack.blobfile import page_memory
from moestro.cache.pack.views import blob_views
from moestro.cache.tiers import PackReader, QueuedReader
from moestro.cache.tiers.transfer import read_blobs
from tiny_packs import assert_is


def request(spec: PackSpec, layer: int, experts: range, *, guessed: bool = False) -> ReadRequest:
    stride = spec.layers[layer].layout.stride_bytes
    buffers = tuple(memoryview(page_memory(stride)) for _ in experts)
    return ReadRequest(layer, experts, tuple(experts), buffers, guessed)


def assert_read(spec: PackSpec, done: ReadRequest) -> None:
    for expert, buffer in zip(done.experts, done.buffers, strict=True):
        flat = torch.frombuffer(buffer, dtype=torch.uint8)
        views = blob_views(flat, 0, spec.layers[done.layer].layout)
        assert_is(views, spec, done.layer, expert)


def queued(pack: Pack) -> QueuedReader:
    try:
        return QueuedReader(pack, ReadQueue(4))
    except OSError as error:
        pytest.skip(f"no queue of the kernel's here: {error}")


@pytest.fixture(params=["one thread", "three threads", "queue"])
def reader(pack: Pack, request: pytest.FixtureRequest) -> Iterator[PackReader]:
    if request.param == "queue":
        reader: PackReader = queued(pack)
    else:
        reader = DirectReader(pack, threads=1 if request.param == "one thread" else 3)
    yield reader
    reader.close()
    reader.close()


def test_blobs_arrive_in_their_buffers(reader: PackReader, spec: PackSpec) -> None:
    asked = [
        request(spec, layer, range(first, first + 3)) for layer in range(3) for first in (0, 3)
    ]
    reader.submit(asked)
    done: list[Completion] = []
    while len(done) < len(asked):
        done += reader.wait()
    assert {id(each.request) for each in done} == {id(each) for each in asked}
    for each in done:
        assert each.error is None
        assert each.read_s > 0
        assert_read(spec, each.request)
    assert reader.poll() == []


def test_a_refused_read_is_delivered_and_the_next_one_works(
    reader: PackReader, pack: Pack, spec: PackSpec
) -> None:
    beyond = ReadRequest(2, range(5, 6), (0,), (memoryview(page_memory(16384)),), False)
    reader.submit([beyond])
    (failed,) = reader.wait()
    assert isinstance(failed.error, ReadFailed)
    assert "ends early" in str(failed.error)
    reader.submit([request(spec, 1, range(2, 4))])
    (fine,) = reader.wait()
    assert_read(spec, fine.request)


@pytest.mark.parametrize("make", [DirectReader, queued])
def test_the_first_read_of_a_blob_is_compared(
    pack: Pack, spec: PackSpec, make: Callable[[Pack], PackReader]
) -> None:
    data = bytearray(pack.path.read_bytes())
    data[-1] ^= 1
    pack.path.write_bytes(data)
    big = Pack.open(pack.path, spec, verify_up_to_bytes=0)
    reader = make(big)
    reader.submit([request(spec, 2, range(4, 6))])
    (failed,) = reader.wait()
    assert isinstance(failed.error, PackInvalid)
    assert "expert 5" in str(failed.error)
    reader.close()
    big.close()


class HeldFile:
    """A pack's file whose reads wait for the test; notes what was read in which order."""

    def __init__(self, read_into: Callable[..., None]) -> None:
        self.read_into_really = read_into
        self.gate = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.offsets: list[int] = []

    def read_into(self, offset: int, buffers: tuple[memoryview, ...]) -> None:
        self.offsets.append(offset)
        self.began.release()
        self.gate.acquire()
        self.read_into_really(offset, buffers)


@pytest.fixture
def held(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> HeldFile:
    held = HeldFile(pack.file.read_into)
    monkeypatch.setattr(pack.file, "read_into", held.read_into)
    return held


def test_demand_goes_before_guesses(pack: Pack, spec: PackSpec, held: HeldFile) -> None:
    reader = DirectReader(pack)
    reader.submit([request(spec, 0, range(1))])
    held.began.acquire()  # under way: what comes now is queued
    reader.submit([request(spec, 0, range(1, 2), guessed=True)])
    reader.submit([request(spec, 0, range(2, 3)), request(spec, 0, range(3, 4))])
    held.gate.release(4)
    done: list[Completion] = []
    while len(done) < 4:
        done += reader.wait()
    assert [each.request.experts[0] for each in done] == [0, 2, 3, 1]
    reader.close()


def test_closing_ends_what_runs_and_forgets_what_waits(
    pack: Pack, spec: PackSpec, held: HeldFile
) -> None:
    reader = DirectReader(pack)
    reader.submit([request(spec, 0, range(1)), request(spec, 0, range(1, 2))])
    held.began.acquire()
    closing = threading.Thread(target=reader.close)
    closing.start()
    with reader._changed:
        reader._changed.wait_for(lambda: reader._closed)
    held.gate.release()
    closing.join()
    reader.close()
    assert held.offsets == [pack.offset(0, 0)]
    (done,) = reader.poll()
    assert_read(spec, done.request)
    assert not any(thread.is_alive() for thread in reader._threads)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_died(
    pack: Pack, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(offset: int, buffers: tuple[memoryview, ...]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pack.file, "read_into", bug)
    reader = DirectReader(pack)
    for guessed in (False, True):
        reader.submit([request(spec, 0, range(1), guessed=guessed)])
        (done,) = reader.wait()
        assert isinstance(done.error, ReadFailed)
        assert done.request.guessed == guessed
    reader.close()


def test_after_a_failed_read_experts_that_were_proved_are_compared_again(
    pack: Pack, spec: PackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was right when the pack was opened may be another disk's bytes by now."""
    with pack.path.open("r+b") as file:  # damaged behind the open pack's back
        file.seek(pack.offset(1, 2))
        file.write(b"\xff\x00" * 32)
    damaged, sound = request(spec, 1, range(2, 3)), request(spec, 0, range(1))
    read_blobs(pack, damaged)  # proved once: nobody looks

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(ReadFailed):
        patched.setattr(os, "preadv", refuse)
        read_blobs(pack, sound)
    for _ in range(2):
        with pytest.raises(PackInvalid, match="expert 2"):
            read_blobs(pack, damaged)
        read_blobs(pack, sound)
        pack.proved(0, [0])
    assert pack.unproved(0)[0] is not None, "in doubt nothing is proved for good"


def test_one_wrong_checksum_puts_the_whole_pack_in_doubt(
    pack_with_flipped_tail: ExpertCache, spec: PackSpec
) -> None:
    pack = pack_with_flipped_tail._loader._pack
    read_blobs(pack, request(spec, 0, range(1)))
    pack.proved(0, [0])
    assert pack.unproved(0)[0] is None
    with pytest.raises(PackInvalid, match="expert 5"):
        read_blobs(pack, request(spec, 2, range(5, 6)))
    assert pack.unproved(0)[0] is not None
