"""What the checks share: the device, how much of everything, and how an engine is opened on it."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from moestro.cache import ExpertCache
from moestro.engine.facts import (
    GIB,
    MIB,
    EngineConfig,
    LinkSpec,
    ModelInfo,
    Progress,
    ProgressFn,
)
from moestro.engine.planning import MemoryPlan
from moestro.engine.step import Engine

from .geometry import REAL_WIDTHS, Geometry

IMAGINED_LINK = LinkSpec(12e9, 10e-6)


class Opened(Protocol):
    """A loaded engine, as much of it as is measured."""

    engine: Engine
    cache: ExpertCache
    info: ModelInfo
    plan: MemoryPlan

    def close(self) -> None: ...


class Opener(Protocol):
    """The engine's `load`. Raises StartError or CacheError."""

    def __call__(self, config: EngineConfig, progress: ProgressFn) -> Opened: ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    limit_s: float  # no check begins later
    register_bytes: tuple[int, ...] = (256 * MIB, GIB, 4 * GIB, 16 * GIB)
    link_bytes: int = 512 * MIB  # moved for one rate
    expert_copy_bytes: int = 96 * MIB  # one expert of Mixtral in nf4
    vocab_size: int = 152_000
    samples: int = 20
    model_bytes: int = 6 * GIB  # experts of one random model in bf16
    most_layers: int = 4
    checked_formats: tuple[str, ...] = ("native", "int8", "nf4")  # for correctness
    formats: tuple[str, ...] = ("native", "int8")  # of real widths
    shares: tuple[float, ...] = (1.0, 0.5, 0.2)  # of the experts in slots of the device
    prompt_tokens: int = 64
    decode_tokens: int = 32
    profiled_tokens: int = 4
    geometries: tuple[Geometry, ...] = REAL_WIDTHS


FULL = Sizes(limit_s=480.0)
QUICK = Sizes(
    limit_s=80.0,
    register_bytes=(256 * MIB, GIB),
    link_bytes=128 * MIB,
    samples=5,
    model_bytes=GIB,
    most_layers=2,
    formats=("native",),
    shares=(1.0, 0.5),
    decode_tokens=12,
    profiled_tokens=2,
)
IMAGINED_MODEL_BYTES = GIB  # a CPU computes them: for looking at a report, not at speeds


def ignore(_: Progress) -> None:
    """Nobody watches these loads."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One run's device, sizes, place for files, and clock."""

    device: torch.device  # cpu: it is only imagined
    device_name: str
    sizes: Sizes
    scratch: Path  # for models and packs
    open_engine: Opener
    ends_s: float  # time.monotonic() from when on no check begins
    clock: Callable[[], float] = time.perf_counter  # of what is measured on the device

    @property
    def imagined(self) -> bool:
        return self.device.type != "cuda"

    def left_s(self) -> float:
        return self.ends_s - time.monotonic()

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if not self.imagined:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Gives back what the last check had on the device."""
        if not self.imagined:
            gc.collect()
            torch.cuda.empty_cache()

    def config(
        self, model: Path, expert_format: str, device_bytes: int, host_bytes: int
    ) -> EngineConfig:
        """With so much room for experts on the device and in the host's memory.

        Experts are read ahead nowhere: what is measured is what was asked for.
        """
        return EngineConfig(
            model,
            self.scratch / "cache",
            device="cpu" if self.imagined else str(self.device),
            link=IMAGINED_LINK if self.imagined else None,
            host_compute=False,  # as on a GPU: each miss is copied
            expert_format=expert_format,
            device_memory_bytes=device_bytes,
            host_memory_bytes=host_bytes,
            kv_memory_bytes=64 * MIB,
            max_model_len_tokens=512,
            max_running=4,
            max_step_tokens=128,
            prefetch=False,
        )

    @contextmanager
    def opened(self, config: EngineConfig) -> Iterator[Opened]:
        """Closed afterwards. Raises StartError or CacheError."""
        opened = self.open_engine(config, ignore)
        try:
            yield opened
        finally:
            opened.close()
