"""What a user may set about the engine. Frozen; checked here once, filled in by nobody later."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moestro.cache import LinkSpec as LinkSpec  # the door hands it on

from .errors import BadParameter


@dataclass(frozen=True, slots=True)
class Progress:
    """One notice about long work: `done` of `total` (`total` 0: unknown) `unit`s of `phase`."""

    phase: str  # "download", "factorize", "pack", "load" …; a new phase ends the one before
    done: int
    total: int
    unit: str = ""  # "bytes", "layers" …


ProgressFn = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Budgets are bytes; None means that the start decides and says what it chose."""

    model_path: Path
    cache_dir: Path
    device: str = "cpu"  # or "cuda", "cuda:N", "auto"
    expert_format: str = "native"  # or "mixed:FILE" (mixed.py), "auto" (auto_format.py)
    dense_format: str = "native"
    host_memory_bytes: int | None = None  # expert slots and staging
    device_memory_bytes: int | None = None  # expert slots of a device with its own memory
    link: LinkSpec | None = None  # on a cpu: a device behind it is imagined
    kv_memory_bytes: int | None = None
    experts_per_token: int | None = None
    experts_tau: float | None = None  # 0 to 1, of a factorized model with routers of norms
    sequence_density: float | None = None  # of requests that do not say; None: tokens choose
    sequence_least_tokens: int = 16  # of a prompt that may choose its sequence's experts
    prefetch: bool = True
    prefetch_experts: int = 1  # the most that one guess reads ahead
    host_compute: bool = True  # experts that a device misses may be computed on the host
    threads: int | None = None
    max_model_len_tokens: int | None = None
    max_running: int = 16  # sequences in one batch
    max_waiting: int = 256  # sequences in the queue behind it
    max_step_tokens: int | None = None  # tokens in one packed pass

    def __post_init__(self) -> None:
        for name in (
            "host_memory_bytes",
            "device_memory_bytes",
            "kv_memory_bytes",
            "experts_per_token",
            "sequence_least_tokens",
            "prefetch_experts",
            "threads",
            "max_step_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadParameter(f"{name} must be positive, not {value}", name)
        if self.experts_tau is not None and not 0 <= self.experts_tau <= 1:
            raise BadParameter(
                f"experts_tau must be between 0 and 1, not {self.experts_tau}", "experts_tau"
            )
        if self.sequence_density is not None and not 0 < self.sequence_density <= 1:
            raise BadParameter(
                f"sequence_density must be above 0 and at most 1, not {self.sequence_density}",
                "sequence_density",
            )
        if self.max_step_tokens is not None and self.max_step_tokens < self.max_running:
            raise BadParameter(
                f"max_step_tokens must be at least max_running ({self.max_running}), not"
                f" {self.max_step_tokens}: each running sequence decodes one token a step",
                "max_step_tokens",
            )
        if self.link is not None and self.device.startswith("cuda"):
            raise BadParameter("a link is emulated on a cpu; this device has a real one", "link")
        if self.device == "cpu" and (self.link is None) != (self.device_memory_bytes is None):
            raise BadParameter(
                "device_memory_bytes and link belong together: a cpu has no memory of its own",
                "device_memory_bytes",
            )

    @property
    def format_name(self) -> str:
        """Of the experts, without the file that says how they are mixed."""
        return self.expert_format.partition(":")[0]

    @property
    def pack_path(self) -> Path:
        """One pack per model folder and format; a changed model or mixture replaces its own."""
        folder = self.model_path.resolve()
        place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        return self.cache_dir / "packs" / f"{folder.name}-{place}" / f"{self.format_name}.pack"
