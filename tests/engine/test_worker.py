"""The thread: requests in, events out, and every way to stop."""

import asyncio
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from moestro.engine import (
    BadParameter,
    DeviceLost,
    Draining,
    EngineConfig,
    EngineFailed,
    EngineState,
    EngineWorker,
    FinishReason,
    LoadCancelled,
    NotReady,
    PackLost,
    Progress,
    QueueFull,
    SamplingParams,
    StartError,
)

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)


def ignore(_: Progress) -> None:
    """A progress bar for nobody."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("worker") / "model")


@pytest.fixture
def worker(folder: Path) -> Iterator[EngineWorker]:
    config = EngineConfig(
        folder, folder.parent / "cache", kv_memory_bytes=1 << 20, threads=1, max_waiting=4
    )
    running = EngineWorker(config, ignore)
    running.start()
    assert running.wait_loaded(60) and running.state is EngineState.READY, running.failure
    yield running
    running.stop()


async def ids_of(worker: EngineWorker, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token async for event in worker.submit(prompt, params) for token in event.token_ids]


async def test_streams_at_once_equal_streams_alone(worker: EngineWorker) -> None:
    prompts = [[5 + i, 6, 7] for i in range(4)]
    alone = [await ids_of(worker, prompt, GREEDY) for prompt in prompts]
    together = await asyncio.gather(*(ids_of(worker, prompt, GREEDY) for prompt in prompts))
    assert alone == together
    assert worker.idle
    assert worker.ask_stats().result(30).requests_finished["length"] == 8


async def test_the_last_event_has_reason_and_timings(worker: EngineWorker) -> None:
    events = [event async for event in worker.submit([1, 2], GREEDY)]
    assert [event.finish_reason for event in events[:-1]] == [None] * 9
    assert events[-1].finish_reason is FinishReason.LENGTH
    timings = events[-1].timings
    assert timings is not None
    assert min(timings.queue_s, timings.prefill_s, timings.decode_s) >= 0


async def test_a_stream_of_several_answers_ends_with_the_last(worker: EngineWorker) -> None:
    params = SamplingParams(max_tokens=5, n=3, ignore_eos=True)
    stream = worker.submit([1, 2], params)
    events = [event async for event in stream]
    assert sorted(e.index for e in events if e.finish_reason is FinishReason.LENGTH) == [0, 1, 2]
    assert sum(len(event.token_ids) for event in events) == 15
    assert worker.idle
    assert worker.most_new_tokens(2, 1) == 510


async def test_cancel_frees_the_sequence(worker: EngineWorker) -> None:
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    stream = worker.submit([1, 2], long)
    await anext(stream)
    stream.cancel()
    stream.cancel()
    assert [event async for event in stream] == []
    stats = await asyncio.wrap_future(worker.ask_stats())
    assert (stats.requests_running, stats.kv_used_bytes) == (0, 0)
    assert stats.requests_finished["abort"] == 1
    assert worker.idle


async def test_bad_requests_raise_at_once(worker: EngineWorker) -> None:
    with pytest.raises(BadParameter):
        worker.submit([], GREEDY)
    assert worker.idle


async def test_draining_refuses_the_new_and_finishes_the_old(worker: EngineWorker) -> None:
    stream = worker.submit([1, 2], GREEDY)
    worker.drain()
    with pytest.raises(Draining):
        worker.submit([1, 2], GREEDY)
    events = [event async for event in stream]
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_the_last_statistics_are_there_while_a_step_lasts(worker: EngineWorker) -> None:
    began, release = threading.Event(), threading.Event()

    def long_step() -> None:
        began.set()
        assert release.wait(60)

    worker._inbox.put(long_step)
    assert await asyncio.to_thread(began.wait, 60)
    before = worker.last_stats
    asked = [worker.ask_stats() for _ in range(3)]
    assert asked[0] is asked[1] is asked[2] and not asked[0].done()
    assert not asked[0].cancel()
    release.set()
    after = await asyncio.wrap_future(asked[0])
    assert worker.last_stats is after is not before
    assert worker.ask_stats() is not asked[0]


async def test_stop_ends_open_streams_with_an_error(worker: EngineWorker) -> None:
    long = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    stream = worker.submit([1, 2], long)
    await anext(stream)
    await asyncio.to_thread(worker.stop)
    events = [event async for event in stream]
    assert events[-1].finish_reason is FinishReason.ERROR
    assert worker.state is EngineState.STOPPED


async def test_a_dead_engine_fails_streams_and_submits(worker: EngineWorker) -> None:
    assert worker._loaded is not None
    stream = worker.submit([1, 2], SamplingParams(max_tokens=400, temperature=0.0))

    def die() -> None:
        raise ZeroDivisionError("planted")

    worker._inbox.put(die)
    with pytest.raises(EngineFailed, match="planted"):
        async for _ in stream:
            pass
    assert worker.state is EngineState.FAILED
    with pytest.raises(EngineFailed):
        worker.submit([1, 2], GREEDY)


@pytest.mark.parametrize(("fault", "kind"), [(None, EngineFailed), ("it is gone", DeviceLost)])
async def test_behind_an_error_that_nobody_expects_the_device_is_asked(
    worker: EngineWorker, fault: str | None, kind: type[EngineFailed]
) -> None:
    assert worker._loaded is not None
    worker._loaded.engine._device_fault = lambda: fault
    stream = worker.submit([1, 2], SamplingParams(max_tokens=400, temperature=0.0))

    def die() -> None:
        raise torch.AcceleratorError("CUDA error: planted")

    worker._inbox.put(die)
    with pytest.raises(kind, match=fault or "planted"):
        async for _ in stream:
            pass
    assert type(worker.failure) is kind


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    worker = EngineWorker(EngineConfig(tmp_path / "nothing", tmp_path), ignore)
    with pytest.raises(NotReady):
        worker.ask_stats()
    worker.start()
    assert worker.wait_loaded(60)
    assert worker.state is EngineState.FAILED
    assert isinstance(worker.failure, StartError)
    with pytest.raises(EngineFailed):
        worker.ask_stats()


def test_a_stopped_load_leaves_no_pack_and_the_next_start_resumes_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def leftovers() -> list[str]:
        ends = (".pack", ".partial", ".journal")
        return sorted(path.name for path in tmp_path.rglob("*") if path.suffix in ends)

    def stop_while_packing(progress: Progress) -> None:
        if progress.phase == "pack" and progress.done == 2:
            packing._stopping.set()

    config = EngineConfig(folder, tmp_path, kv_memory_bytes=1 << 20, threads=1)
    packing = EngineWorker(config, stop_while_packing)
    packing.start()
    assert packing.wait_loaded(60)
    assert isinstance(packing.failure, LoadCancelled)
    assert leftovers() == ["native.journal", "native.partial"]

    again = EngineWorker(config, ignore)
    with caplog.at_level(logging.INFO):
        again.start()
        assert again.wait_loaded(60) and again.state is EngineState.READY, again.failure
    again.stop()
    # A stop is seen at the next notice, after the third layer.
    assert "resuming: 3 of 4 layers are packed" in caplog.text
    assert leftovers() == ["native.pack"]
    once = EngineWorker(replace(config, cache_dir=tmp_path / "once"), ignore)
    once.start()
    assert once.wait_loaded(60) and once.state is EngineState.READY, once.failure
    once.stop()
    resumed, whole = sorted(tmp_path.rglob("native.pack"), key=lambda path: "once" in path.parts)
    assert resumed.read_bytes() == whole.read_bytes()


def test_prepare_runs_first_and_its_refusal_is_the_failure(folder: Path, tmp_path: Path) -> None:
    def refuse(_: object) -> Path:
        raise StartError("no network")

    worker = EngineWorker(EngineConfig(folder, tmp_path), ignore, refuse)
    worker.start()
    assert worker.wait_loaded(60)
    assert str(worker.failure) == "no network"


async def test_nobody_waits_for_a_dead_engine(worker: EngineWorker) -> None:
    """Also not who submitted while the fatal step ran, or just before a stop."""

    def die() -> None:
        raise ZeroDivisionError("planted")

    worker._inbox.put(die)
    streams = [worker.submit([1, 2], GREEDY) for _ in range(3)]
    for stream in streams:
        with pytest.raises(EngineFailed):
            async for _ in stream:
                pass
    assert worker.idle


async def test_nobody_waits_for_a_stopped_engine(worker: EngineWorker) -> None:
    stopping = asyncio.create_task(asyncio.to_thread(worker.stop))
    ended = refused = 0
    while not stopping.done():
        try:
            stream = worker.submit([1, 2], GREEDY)
        except (Draining, EngineFailed, QueueFull):
            refused += 1
        else:
            try:
                async with asyncio.timeout(10):
                    [event async for event in stream]
            except Draining:
                pass
            ended += 1
        await asyncio.sleep(0)
    with pytest.raises(Draining):
        worker.submit([1, 2], GREEDY)
    assert worker.idle and ended + refused > 0


async def test_a_pack_truncated_under_a_running_engine_ends_it(
    folder: Path, tmp_path: Path
) -> None:
    few = 4 * 16384 * 4  # bytes: slots for some of the experts, so that others are read again
    config = EngineConfig(
        folder, tmp_path, kv_memory_bytes=1 << 20, threads=1, host_memory_bytes=few, prefetch=False
    )
    worker = EngineWorker(config, ignore)
    worker.start()
    assert worker.wait_loaded(60) and worker.state is EngineState.READY, worker.failure
    try:
        (pack,) = tmp_path.rglob("*.pack")
        os.truncate(pack, 4096)
        with pytest.raises(EngineFailed):
            for number in range(50):  # until an expert is read
                await ids_of(worker, [number, 6, 7], GREEDY)
        state: EngineState = worker.state
        assert (state, type(worker.failure)) == (EngineState.FAILED, PackLost)
    finally:
        worker.stop()
    again = EngineWorker(config, ignore)
    again.start()
    try:
        assert again.wait_loaded(60) and again.state is EngineState.READY, "it was built anew"
    finally:
        again.stop()
