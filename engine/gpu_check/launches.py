"""What a pass asks of the device: launches, copies, busy time, and where the host waited.

The GPU's part comes from torch.profiler, which slows the host: its shares are of profiled time.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

ATTENTION_MARK = "scaled_dot_product"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Profiled:
    """Of some passes together; None where only a GPU could tell, or the profiler saw none of it."""

    span_us: float
    operations: int  # of torch, not counting those inside others
    launches: int | None
    copies: int | None
    busy_share: float | None  # of the GPU's kernels
    copy_share: float | None
    waited_us: float | None  # by the host, for the GPU
    attention: dict[str, int]  # which kernel of scaled_dot_product_attention was taken

    def as_facts(self) -> dict[str, Any]:
        return asdict(self)


def profiled(work: Callable[[], None], *, on_gpu: bool) -> Profiled:
    """`work` ends when the device has done all of it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as seen:
        work()
    return summary(seen.events() or (), on_gpu=on_gpu)


def summary(events: Iterable[Any], *, on_gpu: bool) -> Profiled:
    """Of torch's FunctionEvents."""
    host = [event for event in events if event.device_type == DeviceType.CPU]
    own = [event for event in events if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in host]
    span_us = max((end for _, end in spans), default=0) - min((at for at, _ in spans), default=0)
    outer = [e for e in host if e.name.startswith("aten::") and not _inside(e)]
    attention = Counter(
        e.name.removeprefix("aten::")
        for e in host
        if ATTENTION_MARK in e.name and e.name.startswith("aten::_")
    )
    if not on_gpu or not own:
        return Profiled(span_us, len(outer), None, None, None, None, None, dict(attention))
    copies = [e for e in own if e.name.startswith(("Memcpy", "Memset"))]
    kernels = [e for e in own if not e.name.startswith(("Memcpy", "Memset"))]
    waited_us = sum(e.time_range.end - e.time_range.start for e in host if e.name in WAITS)
    return Profiled(
        span_us,
        len(outer),
        len(kernels),
        len(copies),
        _covered(kernels) / span_us if span_us else None,
        _covered(copies) / span_us if span_us else None,
        waited_us,
        dict(attention),
    )


def _inside(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return True
        parent = parent.cpu_parent
    return False


def _covered(events: Iterable[Any]) -> float:
    """Microseconds during which at least one of them ran."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
