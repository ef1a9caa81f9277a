"""What every benchmark prints: machine, build, ceiling, figure, percentage, one JSON line."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))


def machine() -> dict[str, Any]:
    """Facts that a figure means nothing without."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "moestro": version("moestro"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def has_flag(name: str) -> bool:
    """Whether this processor says that it has an instruction set, as /proc/cpuinfo spells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return any(line.startswith("flags") and name in line.split() for line in lines)


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of `work`, after one warm-up."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def memory_bandwidth() -> float:
    """Bytes per second of one thread that reads what no cache holds."""
    block = torch.ones(192 << 20)  # 768 MiB
    return block.numel() * 4 / seconds(lambda: block.sum())


def kernel_rate(name: str, rows: int) -> float:
    """Multiply-adds per second of fp32 or int8 for `rows` x [1024, 1024], out of memory."""
    weights = [torch.randn(1024, 1024) for _ in range(48)]
    inputs: torch.Tensor
    if name == "int8":
        weights = [(30 * weight).to(torch.int8) for weight in weights]
        inputs = torch.ones(rows, 1024, dtype=torch.int8)
        taken = seconds(lambda: [torch._int_mm(inputs, weight.t()) for weight in weights])
    else:
        inputs = torch.ones(rows, 1024)
        taken = seconds(lambda: [torch.nn.functional.linear(inputs, w) for w in weights])
    return rows * 1024 * 1024 * len(weights) / taken


def show(line: str) -> None:
    print(line, flush=True)


def finish(name: str, results: dict[str, Any]) -> None:
    """The last line: everything, for a script to read."""
    show(json.dumps({"benchmark": name, "machine": machine(), "results": results}))
