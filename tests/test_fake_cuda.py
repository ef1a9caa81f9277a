"""The imagined GPU keeps CUDA's promises, and tells where a program counts on more than these."""

import ctypes
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from fake_cuda import FakeCuda
from fake_cuda_facts import Code, Gpu
from fake_cuda_torch import installed
from vector_clocks import Race, Unwritten
from virtual_device import Operation

MIB = 1 << 20
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """1 MiB takes a millisecond to cross; calls take no time."""
    with installed(FakeCuda(Gpu(1 << 30, copy_bytes_per_s=MIB * 1e3, call_s=0.0))) as cuda:
        yield cuda


def pinned(value: int, size: int = MIB) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8, pin_memory=True)


def empty(size: int = MIB) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=DEVICE)


def event(*, timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)


def test_tensors_say_where_they_are(cuda: FakeCuda) -> None:
    here, there, locked = torch.zeros(3), torch.zeros(3, device=DEVICE), pinned(1, 3)
    assert (here.device.type, there.device, locked.device.type) == ("cpu", DEVICE, "cpu")
    assert [x.is_pinned() for x in (here, there, locked)] == [False, False, True]
    assert [x.is_cuda for x in (here, there, there[1:], there + 1)] == [False, True, True, True]
    assert there.to("cpu").device.type == "cpu" and here.to(DEVICE).device == DEVICE
    assert here.to(there).device == DEVICE and there.to(here).device.type == "cpu"
    assert (here.to(DEVICE) + there).tolist() == [0, 0, 0]
    with torch.inference_mode():
        assert all(x.is_cuda for x in (there.double(), there.reshape(3, 1), there @ there[:, None]))
    with pytest.raises(RuntimeError, match="same device"):
        torch.add(here, there)


def test_a_stream_runs_in_its_order(cuda: FakeCuda) -> None:
    seen: list[str] = []
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        for name in ("long", "short"):
            taken_s = 5.0 if name == "long" else 1.0
            cuda.kernel(name, duration_s=taken_s, run=partial(seen.append, name))
    cuda.kernel("elsewhere", duration_s=2.0, run=partial(seen.append, "elsewhere"))
    cuda.timeline.turn(5.5)
    assert seen == ["elsewhere", "long"]
    stream.synchronize()
    assert seen == ["elsewhere", "long", "short"] and cuda.timeline.now_s == 6.0


def test_who_reads_too_early_sees_old_bytes(cuda: FakeCuda) -> None:
    target, source = empty(4), pinned(7, 4)
    target.fill_(1)
    target.copy_(source, non_blocking=True)
    assert ctypes.string_at(target.data_ptr(), 4) == bytes([1] * 4)  # looks past the detector
    assert target.tolist() == [7] * 4


def test_an_event_carries_its_order_from_stream_to_stream(cuda: FakeCuda) -> None:
    target, copied = empty(), event()
    with torch.cuda.stream(torch.cuda.Stream()):
        target.copy_(pinned(3), non_blocking=True)
        copied.record()
    assert not copied.query()
    copied.wait(torch.cuda.current_stream())
    cuda.kernel("compute", [target], duration_s=1e-3)
    torch.cuda.synchronize()
    copy, compute = cuda.timeline.ended
    assert copy.name.startswith("copy") and compute.name == "compute"
    assert copy.ends_s == pytest.approx(1e-3)
    assert compute.ends_s == pytest.approx(2e-3)


@pytest.mark.parametrize("how", ["query", "event", "stream", "device", "wait_stream"])
def test_each_way_to_wait_orders(cuda: FakeCuda, how: str) -> None:
    stream, target, copied = torch.cuda.Stream(), empty(), event()
    with torch.cuda.stream(stream):
        target.copy_(pinned(3), non_blocking=True)
        copied.record()
    if how == "query":
        cuda.timeline.turn(1.0)
        assert copied.query()
    elif how == "event":
        copied.synchronize()
    elif how == "stream":
        stream.synchronize()
    elif how == "device":
        torch.cuda.synchronize()
    else:
        torch.cuda.current_stream().wait_stream(stream)
    assert target.tolist()[:2] == [3, 3]


def test_a_missing_wait_is_a_race_though_time_would_have_healed_it(cuda: FakeCuda) -> None:
    target = empty()
    with torch.cuda.stream(torch.cuda.Stream()):
        target.copy_(pinned(3), non_blocking=True)
    cuda.timeline.turn(1.0)  # long done, but nobody has asked
    with pytest.raises(
        Race, match=r"device 0\[0\]: compute \(stream 1\) does not wait for copy .*"
    ):
        cuda.kernel("compute", [target])


def test_an_event_that_was_asked_too_early_orders_nothing(cuda: FakeCuda) -> None:
    target, copied = empty(), event()
    with torch.cuda.stream(torch.cuda.Stream()):
        target.copy_(pinned(3), non_blocking=True)
        copied.record()
    assert not copied.query()
    with pytest.raises(Race):
        target.add_(1)


def test_an_event_orders_what_came_before_its_record_alone(cuda: FakeCuda) -> None:
    target, early = empty(), event()
    with torch.cuda.stream(torch.cuda.Stream()):
        early.record()
        target.copy_(pinned(3), non_blocking=True)
    early.synchronize()
    with pytest.raises(Race):
        target.add_(1)


def test_ranges_are_told_apart(cuda: FakeCuda) -> None:
    target = empty()
    with torch.cuda.stream(torch.cuda.Stream()):
        target[:100].copy_(pinned(3, 100), non_blocking=True)
    target[100:].fill_(1)
    with pytest.raises(Race, match=r"device 0\[99\]"):
        cuda.kernel("compute", writes=[target[99:]])


def test_writing_what_is_still_read_is_a_race(cuda: FakeCuda) -> None:
    target, source = empty(), pinned(3)
    target.copy_(source, non_blocking=True)
    with pytest.raises(Race, match=r"pinned 0\[0\]: fill_ \(host\) does not wait for copy"):
        source.fill_(4)
    with pytest.raises(Race, match="fill_"):  # said again, to who goes on
        torch.cuda.synchronize()
    cuda.found = None
    torch.cuda.synchronize()
    source.fill_(5)
    with torch.cuda.stream(torch.cuda.Stream()):
        cuda.kernel("compute", [target])
    with pytest.raises(Race, match="copy .* does not wait for compute"):
        target.copy_(source, non_blocking=True)


def test_reading_before_anybody_wrote_is_a_fault(cuda: FakeCuda) -> None:
    with pytest.raises(Unwritten, match=r"reads device 0\[0\], which nobody has written"):
        cuda.kernel("compute", [empty()])
    cuda.found = None
    memory = bytearray(64)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    assert torch.cuda.cudart().cudaHostRegister(host.data_ptr(), 64, 0) == 0
    cuda.host_wrote(memoryview(memory)[8:16], "a read begins", garbage=True)
    empty(8).copy_(host[:8], non_blocking=True)
    with pytest.raises(Unwritten, match="garbage since a read begins"):
        empty(8).copy_(host[8:16], non_blocking=True)
    cuda.found = None
    cuda.host_wrote(memoryview(memory)[8:16], "a read ends")
    empty(8).copy_(host[8:16], non_blocking=True)


def test_one_engine_serves_a_direction_and_goes_on_with_its_stream(cuda: FakeCuda) -> None:
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    begin = [event(timing=True) for _ in range(2)]
    done = [event(timing=True) for _ in range(2)]
    for at, (stream, count) in enumerate([(first, 3), (second, 2)]):
        with torch.cuda.stream(stream):
            begin[at].record()
            for _ in range(count):
                empty().copy_(pinned(at), non_blocking=True)
            done[at].record()
    away = torch.zeros(MIB, dtype=torch.uint8, device=DEVICE)
    torch.empty_like(away, device="cpu", pin_memory=True).copy_(away, non_blocking=True)
    torch.cuda.synchronize()
    assert begin[0].elapsed_time(done[0]) == pytest.approx(3.0)
    assert begin[1].elapsed_time(done[1]) == pytest.approx(5.0)  # of which it waited 3
    assert cuda.timeline.now_s == pytest.approx(5e-3, rel=0.01)  # outwards is an engine of its own


def test_registering_is_refused_with_a_code_and_the_next_kernel_tells_again() -> None:
    with installed(FakeCuda(Gpu(register_bytes=MIB, register_all_bytes=2.5 * MIB))):
        host, there = torch.zeros(4 * MIB, dtype=torch.uint8), torch.zeros(4, device=DEVICE)
        register, at = torch.cuda.cudart().cudaHostRegister, host.data_ptr()
        assert register(at, MIB + 1, 0) == Code.OUT_OF_MEMORY
        with pytest.raises(torch.AcceleratorError, match="out of memory"):
            there.add_(1)
        there.add_(1)
        assert [int(register(at + k * MIB, MIB, 0)) for k in (0, 0, 1, 2)] == [0, 712, 0, 2]
        assert host[:5].is_pinned() and not host[2 * MIB :].is_pinned()
        with pytest.raises(torch.AcceleratorError, match="invalid value"):  # leaves its piece
            empty(4).copy_(host[MIB - 2 : MIB + 2], non_blocking=True)
        unregister = torch.cuda.cudart().cudaHostUnregister
        assert [int(unregister(at + k)) for k in (MIB, 5, MIB)] == [0, 713, 713]
        assert register(at + 2 * MIB, MIB, 0) == 0


def test_pageable_memory_makes_the_host_wait_and_may_change_at_once(cuda: FakeCuda) -> None:
    host, there = torch.full((MIB,), 9, dtype=torch.uint8), empty()
    there.copy_(host, non_blocking=True)
    assert cuda.timeline.now_s == pytest.approx(1e-3)
    host.fill_(1)
    back = torch.zeros(MIB, dtype=torch.uint8)
    back.copy_(there, non_blocking=True)
    assert back[:2].tolist() == [9, 9]


def test_memory_runs_out() -> None:
    with installed(FakeCuda(Gpu(memory_bytes=MIB, pinned_bytes=100))):
        empty(MIB - 10)
        assert torch.cuda.mem_get_info(DEVICE) == (10, MIB)
        with pytest.raises(torch.OutOfMemoryError):
            empty(11)
        with pytest.raises(RuntimeError, match="out of memory"):
            pinned(1, 101)
        assert empty(10).device == DEVICE


def test_an_error_that_sticks_is_told_by_every_later_call(cuda: FakeCuda) -> None:
    there, passed = torch.zeros(4, device=DEVICE), event()
    torch.cuda.synchronize()
    passed.record()
    cuda.stick_in(1)
    assert passed.query()
    for call in (
        passed.query,
        passed.record,
        passed.synchronize,
        torch.cuda.synchronize,
        lambda: there.add_(1),
        lambda: there.copy_(torch.ones(4)),
        lambda: torch.zeros(1, device=DEVICE),
    ):
        with pytest.raises(torch.AcceleratorError, match="illegal address"):
            call()
    assert torch.cuda.cudart().cudaHostRegister(there.data_ptr(), 4, 0) == Code.ILLEGAL_ADDRESS


def test_who_waits_for_ever_is_told(cuda: FakeCuda) -> None:
    stuck = event()
    cuda.mark(cuda.default, "wait", Operation("what nobody queued"))
    stuck.record()
    with pytest.raises(AssertionError, match="waits for ever for event"):
        stuck.synchronize()
