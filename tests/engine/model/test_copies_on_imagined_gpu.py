"""What a layer queues on an imagined GPU while experts are on their way there."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tiny
from engine_kit import opened, run_logits
from fake_cuda import FakeCuda
from fake_cuda_facts import Gpu
from fake_cuda_torch import installed
from moestro.engine.loader import Loaded
from moestro.engine.model.experts import bind
from virtual_device import Operation

SLOW = Gpu(4 << 30, copy_bytes_per_s=1e6, kernel_s=1e-7)  # an expert takes 25 ms to cross
TOGETHER = [[(1, [5, 6, 7]), (2, [8, 9]), (3, [30])]]
TOGETHER += [[(1, [10 + i]), (2, [50 + i]), (3, [90 + i])] for i in range(6)]
SLOT_BYTES = 3 * 64 * 64 * 2
DEVICE_SLOTS = 14  # of 32: some are there, some are not


def _noting(
    cuda: FakeCuda, layers: list[list[Operation]], own: Callable[..., Any], *args: Any
) -> Any:
    begun = len(cuda.timeline.queued)
    out = own(*args)
    layers.append(cuda.timeline.queued[begun:])
    return out


def _note(cuda: FakeCuda, loaded: Loaded) -> list[list[Operation]]:
    """What each layer's experts queue, from now on."""
    layers: list[list[Operation]] = []
    for module in loaded.engine.runner.lane.model.modules():
        if "moestro_experts" in module.__dict__:
            bind(module, partial(_noting, cuda, layers, module.__dict__["moestro_experts"]))
    return layers


def test_nothing_small_crosses_behind_experts_and_residents_do_not_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the modes are those of one thread
    folder = tiny.build("mixtral", tmp_path / "model")
    cuda = FakeCuda(SLOW)
    settings: dict[str, Any] = {"prefetch": False, "device_memory_bytes": DEVICE_SLOTS * SLOT_BYTES}
    with (
        installed(cuda),
        opened(folder, tmp_path / "cache", device="cuda", **settings) as loaded,
    ):
        assert loaded.info.expert_bytes == SLOT_BYTES
        layers = _note(cuda, loaded)
        run_logits(loaded, TOGETHER)
    overlapped = 0
    for queued in layers:
        copies = [each for each in queued if each.engine is cuda.to_device]
        assert all(each.queue is not cuda.default.queue for each in copies)
        if not copies:
            continue
        behind = queued[queued.index(copies[0]) :]
        products = [x for x in behind if x.name in ("mm", "mv")]
        first_miss_s = min(each.ends_s for each in copies if each.ends_s is not None)
        ends_s = [each.ends_s for each in products if each.ends_s is not None]
        overlapped += bool(ends_s) and min(ends_s) < first_miss_s
    assert overlapped > len(layers) / 4
