"""What every bar's module works with: the models, the peers, and the turns."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report

from .bars import Bar
from .geometry import GIB, Geometry
from .gguf_file import write_q8_0
from .kernels import PromptBound
from .llama_cpp import LlamaCpp
from .maker import make_random, make_skewed
from .ours import Task
from .places import Workshop
from .processes import HERE, Outcome, TurnFailed, last_json, module, run

REASON_LINES = 6


@dataclass(slots=True)
class Bench:
    """One run of some bars."""

    shop: Workshop
    peers: Path
    shape: Geometry
    demo_cache: Path  # where the demo model lies
    turns: int = 2  # of each side, alternating
    bars: list[Bar] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # comparisons left out, with the reason

    @property
    def llama(self) -> LlamaCpp:
        return LlamaCpp(self.peers)

    def checkpoint(self, variant: str = "random") -> Path:
        """The synthetic model; `variant` is random or skewed."""
        place = self.shop.path("olmoe-random")
        if not (place / "config.json").exists():
            report.show(f"making {place} ({self.shape.checkpoint_bytes / GIB:.1f} GiB)")
        twin = make_random(place, self.shape)
        if variant == "random":
            return twin
        return make_skewed(self.shop.path("olmoe-skewed"), twin, self.shape)

    def gguf(self, kind: str, variant: str = "random") -> Path:
        """The same as GGUF; `kind` is q8_0 or q4_0."""
        path = self.shop.path(f"olmoe-{variant}-{kind}.gguf")
        if path.exists():
            return path
        if kind == "q8_0":
            report.show(f"converting to {path} (minutes)")
            return write_q8_0(self.checkpoint(variant), path, self.shape)
        source = self.gguf("q8_0", variant)
        report.show(f"quantizing to {path} (minutes)")
        self.llama.quantize(source, path, "Q4_0")
        if variant != "random":
            self.shop.drop(source)
        return path

    def ours(self, variant: str = "random", **fields: Any) -> dict[str, Any]:
        """One turn of moestro over the synthetic model."""
        return self.ours_seen(variant, **fields)[0]

    def ours_seen(
        self, variant: str = "random", turn: dict[str, Any] | None = None, **fields: Any
    ) -> tuple[dict[str, Any], Outcome]:
        """The same, with what was seen from outside; `turn` is for `processes.run`."""
        model = fields.pop("model", None) or self.checkpoint(variant)
        fields = {"host_memory": self.all_experts(fields.get("experts", "int8")), **fields}
        task = Task(model, fields.pop("cache", self.cache), **fields)
        outcome = module("full.ours", task.as_json(), **(turn or {}))
        return last_json(outcome.stdout), outcome

    def all_experts(self, experts: str) -> int:
        """A budget in bytes that holds every expert in any layout of the format."""
        width = {"native": 2.0, "int8": 1.0, "int4": 0.625}.get(experts, 2.0)
        count = self.shape.layers * self.shape.experts
        return int(count * (self.shape.expert_numbers * width * 1.02 + (1 << 20)))

    @property
    def cache(self) -> Path:
        return self.shop.path("cache")

    def bound(self, tokens: int) -> PromptBound:
        """The ceilings, measured as a turn is: first in line for a core."""
        outcome = module("full.kernels", json.dumps(asdict(self.shape)), tokens)
        return PromptBound(**last_json(outcome.stdout))

    def stock(self, turn: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """One turn of stock transformers, in its own environment where there is one."""
        own = self.peers / "stock" / "bin" / "python"
        python = own if own.exists() else Path(sys.executable)
        task = json.dumps({"model": str(self.checkpoint()), **fields}, default=str)
        return last_json(run([python, "-P", HERE / "stock_turn.py", task], **(turn or {})).stdout)

    def hold(self, bar: Bar) -> Bar:
        """Note and print one verdict."""
        self.bars.append(bar)
        report.show(f"  {bar.line()}")
        return bar

    def without(self, what: str, reason: object) -> None:
        """Say that a comparison is left out."""
        lines = str(reason).splitlines()
        self.missing.append(f"{what}: {lines[0] if len(lines) == 1 else lines[-1]}")
        report.show(f"  {what}: left out: " + "\n    ".join(lines[-REASON_LINES:]))


def begin(title: str) -> None:
    """What every bar's output starts with."""
    load = os.getloadavg()[0]
    report.show(f"== {title}")
    report.show(f"machine: {report.machine()}")
    report.show(f"load of others: {load:.1f}; every turn: one thread, priority raised if allowed")


def finish(name: str, bench: Bench, results: dict[str, Any], names: Sequence[str] = ()) -> None:
    """The one JSON line of a bar's module, with its verdicts."""
    rows = [bar.row() for bar in bench.bars if bar.name.startswith(name.upper())]
    report.finish(name, results | {"bars": rows, "left_out": list(bench.missing)})


__all__ = ["Bench", "TurnFailed", "begin", "finish"]
