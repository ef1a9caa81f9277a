"""A profile's figures, from events as torch's profiler gives them, and from one of its own."""

from dataclasses import dataclass

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from moestro.engine.gpu_check.launches import profiled, summary


@dataclass(frozen=True)
class Range:
    start: float
    end: float


@dataclass(frozen=True)
class Event:
    name: str
    time_range: Range
    device_type: object = DeviceType.CPU
    cpu_parent: "Event | None" = None


def kernel(name: str, start: float, end: float) -> Event:
    return Event(name, Range(start, end), DeviceType.CUDA)


def test_busy_time_counts_overlaps_once() -> None:
    outer = Event("aten::linear", Range(0, 40))
    flash = "aten::_scaled_dot_product_flash_attention"
    events = [
        outer,
        Event("aten::mm", Range(5, 20), cpu_parent=outer),
        Event(flash, Range(40, 60)),
        Event("cudaEventSynchronize", Range(70, 100)),
        kernel("gemm", 10, 30),
        kernel("softmax", 20, 40),
        kernel("add", 60, 70),
        kernel("Memcpy HtoD (Pinned -> Device)", 0, 50),
    ]
    found = summary(events, on_gpu=True)
    assert (found.operations, found.launches, found.copies) == (2, 3, 1)
    assert found.busy_share == pytest.approx(0.4)
    assert found.copy_share == pytest.approx(0.5)
    assert (found.span_us, found.waited_us) == (100, 30)
    assert found.attention == {"_scaled_dot_product_flash_attention": 1}


def test_a_profiler_that_saw_nothing_of_the_gpu_counts_nothing() -> None:
    found = summary([Event("aten::mm", Range(0, 5))], on_gpu=True)
    assert found.operations == 1
    assert found.launches is found.copies is found.busy_share is found.waited_us is None


def test_without_a_gpu_its_figures_are_none_and_operations_are_counted() -> None:
    weights = torch.ones(8, 8)

    def work() -> None:
        for _ in range(3):
            torch.nn.functional.linear(weights, weights)

    found = profiled(work, on_gpu=False)
    assert found.operations == 3
    assert found.launches is found.busy_share is found.waited_us is None
    assert found.span_us > 0
