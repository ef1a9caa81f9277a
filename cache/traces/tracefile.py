"""What was asked for, written down: one line per layer event, to be replayed (replayer.py).

    {"moestro_trace": 2, "model": ..., "layers": [{"name", "num_experts", "stride_bytes"} ...]}
    [step, "p" or "d", layer, [experts]]
    [step, "p", layer, [experts], tokens, [tokens that chose each]]
    {"live_decode": {"slots", "hits", "lookups"}}      at the end, where the recorder counted them

Steps count from 0; a new one begins when the layer is not a later one than the event's before.
"p" is prefill, "d" decode. JSON lines: readable everywhere, about 40 bytes an event. Files of
format 1, which have no counts, are read, too.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from moestro.cache.facts import PackSpec, Phase, Routed, TraceInvalid, read_fields

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)

_log = logging.getLogger("moestro.cache")
_LIVE = "live_decode"
_LETTERS = {Phase.PREFILL: "p", Phase.DECODE: "d"}
_PHASES = {letter: phase for phase, letter in _LETTERS.items()}


@dataclass(frozen=True, slots=True)
class TraceLayer:
    """One experts module: what a replay has to know about it."""

    name: str
    num_experts: int
    stride_bytes: int  # what one load reads; in a mixed layer, at most


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """Of which model a trace is."""

    model: str
    layers: tuple[TraceLayer, ...]

    @classmethod
    def of(cls, spec: PackSpec) -> "TraceHeader":
        layers = (TraceLayer(x.name, x.num_experts, x.layout.stride_bytes) for x in spec.layers)
        return cls(spec.model, tuple(layers))

    @property
    def experts_per_layer(self) -> list[int]:
        return [layer.num_experts for layer in self.layers]


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One layer of one step asked for these distinct experts, in this order."""

    step: int
    phase: Phase
    layer: int
    experts: tuple[int, ...]
    routed: Routed | None = None  # of a prompt, where it was recorded


@dataclass(frozen=True, slots=True)
class LiveCount:
    """What the recording cache itself counted in decode steps; it need not have begun empty."""

    slots: int
    hits: int
    lookups: int


class TraceWriter:
    """Give it to `ExpertCache.record`; close it (or leave its block) to have it all on disk.

    Nobody may wait or fail because of a trace: when the disk refuses, the recording ends with a
    warning. Raises OSError only when the file cannot be begun.
    """

    def __init__(self, path: Path, spec: PackSpec) -> None:
        """Replaces what is at `path`."""
        self.path = path
        self._file = path.open("w", encoding="utf-8")
        self._step = 0
        self._layer = -1
        header = TraceHeader.of(spec)
        layers = [
            {"name": x.name, "num_experts": x.num_experts, "stride_bytes": x.stride_bytes}
            for x in header.layers
        ]
        self._write({"moestro_trace": FORMAT_VERSION, "model": header.model, "layers": layers})

    def record(
        self, layer: int, experts: Sequence[int], phase: Phase, routed: Routed | None = None
    ) -> None:
        if layer <= self._layer:
            self._step += 1
        self._layer = layer
        if not self._file.closed:
            counts = () if routed is None else (routed.tokens, routed.counts)
            self._write([self._step, _LETTERS[phase], layer, list(experts), *counts])

    def live(self, count: LiveCount) -> None:
        """Once, after the last event."""
        if not self._file.closed:
            self._write({_LIVE: asdict(count)})

    def close(self) -> None:
        """Idempotent."""
        try:
            self._file.close()
        except OSError as error:
            _log.warning("the trace %s is not whole: %s", self.path, error.strerror)

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, line: Any) -> None:
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            _log.warning("recording into %s ends: %s", self.path, error.strerror)
            self.close()


class TraceReader:
    """A trace's header; iterating gives its events, from the first one each time.

    `live` is what the recording cache counted, known when iterating has come to the end.

    A last line without its end, as a killed recorder leaves it, is passed over. Anything else
    that is not a trace raises TraceInvalid, here or at the line where it is found.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.live: LiveCount | None = None
        try:
            self.header = _header(json.loads(next(self._lines(), "")))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise TraceInvalid(f"{path}, line 1: not the header of a trace: {error}") from error

    def __iter__(self) -> Iterator[TraceEvent]:
        lines = self._lines()
        next(lines, None)
        for number, line in enumerate(lines, start=2):
            try:
                found = json.loads(line)
                if isinstance(found, dict):
                    self.live = read_fields(LiveCount, found[_LIVE], ("slots",))
                    continue
                yield _event(found, self.header)
            except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
                raise TraceInvalid(f"{self.path}, line {number}: not an event: {error}") from error

    def _lines(self) -> Iterator[str]:
        try:
            # A byte that is no text is told by its line, not by the block that it was read in.
            with self.path.open(encoding="utf-8", errors="surrogateescape") as file:
                yield from (line for line in file if line.endswith("\n"))
        except OSError as error:
            raise TraceInvalid(f"{self.path}: {error.strerror}") from error


def _header(found: dict[str, Any]) -> TraceHeader:
    if found["moestro_trace"] not in READABLE_VERSIONS:
        raise ValueError(f"format {found['moestro_trace']}, not one of {READABLE_VERSIONS}")
    sizes = ("num_experts", "stride_bytes")
    layers = [read_fields(TraceLayer, layer, sizes) for layer in found["layers"]]
    if not isinstance(found["model"], str):
        raise ValueError(f"model is {found['model']!r}, not text")  # a file's fault
    return TraceHeader(found["model"], tuple(layers))


def _event(found: Sequence[Any], header: TraceHeader) -> TraceEvent:
    step, letter, layer, experts, *rest = found
    if type(step) is not int or type(layer) is not int or step < 0:
        raise ValueError(f"step {step!r} and layer {layer!r} are no places")
    known = range(header.layers[layer].num_experts) if layer in range(len(header.layers)) else ()
    if len(set(experts)) != len(experts) or not all(expert in known for expert in experts):
        raise ValueError(f"layer {layer} has no such experts")
    routed = _routed(*rest, of=len(experts)) if rest else None
    return TraceEvent(step, _PHASES[letter], layer, tuple(experts), routed)


def _routed(tokens: int, counts: Sequence[int], *, of: int) -> Routed:
    if len(counts) != of or not all(0 < count <= tokens for count in counts):
        raise ValueError(f"{tokens} tokens cannot have chosen {of} experts like {counts}")
    return Routed(tokens, tuple(counts))
