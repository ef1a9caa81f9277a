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
from .quality import Quality
from .streams import Streams

REASON_LINES = 6


@dataclass(slots=True)
class Bench:
    """One run of some bars."""

    shop: Workshop
    peers: Path
    shape: Geometry
    demo_cache: Path  # where the demo model lies
    turns: int = 2  # of each side, alternating
    quality: Quality = field(default_factory=Quality)  # of P9
    bars: list[Bar] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # comparisons left out, with the reason

    @property
    def llama(self) -> LlamaCpp:
        return LlamaCpp(self.peers)

    def checkpoint(self, variant: str = "random") -> Path:
        """The synthetic model; `variant` is random or skewed."""
        place = self._named("random")
        if not (place / "config.json").exists():
            report.show(f"making {place} ({self.shape.checkpoint_bytes / GIB:.1f} GiB)")
        twin = make_random(place, self.shape)
        if variant == "random":
            return twin
        return make_skewed(self._named("skewed"), twin, self.shape)

    def drop_checkpoint(self, variant: str) -> None:
        self.shop.drop(self._named(variant))

    def pair(self, experts: str, kind: str, variant: str = "random") -> Path | None:
        """Room for the pack of one format beside one GGUF, which is returned where llama.cpp is.

        All other packs and GGUF files are removed: so much disk is enough.
        """
        if not self.llama.available:
            self.only((experts,))
            return None
        # Q4_0 is made of Q8_0
        source = kind if self._gguf(kind, variant).exists() else "q8_0"
        self.only((experts,), (source,), variant)
        return self.gguf(kind, variant)

    def gguf(self, kind: str, variant: str = "random") -> Path:
        """The same as GGUF; `kind` is q8_0 or q4_0. Making it removes all packs: it needs room."""
        path = self._gguf(kind, variant)
        if path.exists():
            return path
        if kind == "q8_0":
            self.only()
            report.show(f"converting to {path} (minutes)")
            return write_q8_0(self.checkpoint(variant), path, self.shape)
        source = self.gguf("q8_0", variant)
        self.only((), ("q8_0",), variant)
        report.show(f"quantizing to {path} (minutes)")
        self.llama.quantize(source, path, "Q4_0")
        self.shop.drop(source)
        return path

    def only(
        self, packs: Sequence[str] = (), ggufs: Sequence[str] = (), variant: str = "random"
    ) -> None:
        """Remove all packs but those of expert formats `packs`, all GGUF files but `ggufs`."""
        kept = {self.cache(name) for name in packs}
        kept |= {self._gguf(kind, variant) for kind in ggufs}
        for path in self.shop.made("cache-*", "*.gguf"):
            if path not in kept:
                self.shop.drop(path)

    def _named(self, name: str) -> Path:
        """Of this depth, so that what another geometry has left is never taken for it."""
        return self.shop.path(f"olmoe{self.shape.layers}-{name}")

    def _gguf(self, kind: str, variant: str) -> Path:
        return self._named(f"{variant}-{kind}.gguf")

    def ours(self, variant: str = "random", **fields: Any) -> dict[str, Any]:
        """One turn of moestro over the synthetic model."""
        return self.ours_seen(variant, **fields)[0]

    def ours_seen(
        self, variant: str = "random", turn: dict[str, Any] | None = None, **fields: Any
    ) -> tuple[dict[str, Any], Outcome]:
        """The same, with what was seen from outside; `turn` is for `processes.run`."""
        model = fields.pop("model", None) or self.checkpoint(variant)
        experts = fields.get("experts", "int8")
        fields = {"host_memory": self.all_experts(experts), **fields}
        task = Task(model, fields.pop("cache", self.cache(experts)), **fields)
        outcome = module("full.ours", task.as_json(), **{"threads": task.threads} | (turn or {}))
        return last_json(outcome.stdout), outcome

    def all_experts(self, experts: str) -> int:
        """A budget in bytes that holds every expert in any layout of the format."""
        width = {"native": 2.0, "int8": 1.0, "int4": 0.75}.get(experts, 2.0)
        count = self.shape.layers * self.shape.experts
        return int(count * (self.shape.expert_numbers * width * 1.02 + (1 << 20)))

    def cache(self, experts: str) -> Path:
        """The cache folder for packs of one expert format, so that each can be removed alone."""
        return self.shop.path(f"cache-{experts}")

    def bound(self, tokens: int, experts: str) -> PromptBound:
        """The ceilings, measured as a turn is: first in line for a core."""
        outcome = module("full.kernels", json.dumps(asdict(self.shape)), tokens, experts)
        return PromptBound(**last_json(outcome.stdout))

    def streams(self, threads: int = 1) -> Streams:
        """How fast this memory can be read at this moment, measured as a turn is."""
        outcome = module("full.streams", self.shop.path("streams"), threads, threads=threads)
        return Streams(**last_json(outcome.stdout))

    def stock(self, turn: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """One turn of stock transformers, in its own environment where there is one."""
        own = self.peers / "stock" / "bin" / "python"
        python = own if own.exists() else Path(sys.executable)
        model = fields.pop("model", None) or self.checkpoint()
        task = json.dumps({"model": model, **fields}, default=str)
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
    report.show(f"load of others: {load:.1f}; one thread unless said; priority raised if allowed")


def finish(name: str, bench: Bench, results: dict[str, Any], names: Sequence[str] = ()) -> None:
    """The one JSON line of a bar's module, with its verdicts."""
    rows = [bar.row() for bar in bench.bars if bar.name.startswith(f"{name.upper()} ")]
    report.finish(name, results | {"bars": rows, "left_out": list(bench.missing)})


__all__ = ["Bench", "TurnFailed", "begin", "finish"]
