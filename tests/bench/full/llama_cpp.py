"""llama.cpp, built natively: its own benchmark, its own quantizer, its own timings."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import TurnFailed, run

# "prompt eval time = 1234.56 ms / 256 tokens ( 4.82 ms per token, 207.37 tokens per second)"
TIMING = re.compile(
    r"(?P<part>prompt eval|eval) time\s*=\s*(?P<ms>[\d.]+) ms /\s*(?P<tokens>\d+) (?:tokens|runs)"
)


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second; None where it was not asked for."""

    prefill: float | None
    decode: float | None


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """The programs below `folder`, as scripts/bench_peers.sh built them."""

    folder: Path

    @property
    def available(self) -> bool:
        return self._program("llama-bench").exists()

    def version(self) -> str:
        text = run([self._program("llama-bench"), "--version"]).stdout
        return next((line for line in text.splitlines() if "version" in line), "unknown").strip()

    def bench(
        self,
        model: Path,
        *,
        prefill: int = 0,
        decode: int = 0,
        repeats: int = 1,
        threads: int = 1,
        **settings: Any,
    ) -> Speeds:
        """llama-bench: random tokens, all in RAM, weights repacked as it likes."""
        command: list[str | Path] = [
            self._program("llama-bench"),
            "-m",
            model,
            "-t",
            str(threads),
            "-r",
            str(repeats),
        ]
        command += ["-p", str(prefill), "-n", str(decode), "-o", "jsonl"]
        return parse_bench(run(command, threads=threads, **settings).stdout)

    def complete(
        self, model: Path, prompt: Path, decode: int, extra: tuple[str, ...] = (), **settings: Any
    ) -> Speeds:
        """llama-completion over one prompt of a file, cold: prefill and decode in one process."""
        command: list[str | Path] = [self._program("llama-completion"), "-m", model, "-t", "1"]
        command += ["-f", prompt, "-n", str(decode + 1), "--ignore-eos", "--no-warmup", "-no-cnv"]
        command += ["--temp", "1", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "7"]
        command += ["--no-display-prompt", "-c", "1024", *extra]
        return parse_timings(run(command, **settings).stdout)

    def quantize(self, source: Path, out: Path, kind: str) -> None:
        """`source` is Q8_0 already: the speed of Q4_0 does not hang on its second rounding."""
        if not out.exists():
            part = out.with_suffix(".part")
            program = self._program("llama-quantize")
            run([program, "--allow-requantize", source, part, kind, "1"])
            part.replace(out)

    def _program(self, name: str) -> Path:
        return self.folder / "build" / "bin" / name


def parse_bench(text: str) -> Speeds:
    """From llama-bench's JSON lines, medians of its samples."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        samples = sorted(row["samples_ts"])
        middle = len(samples) // 2
        median = samples[middle] if len(samples) % 2 else sum(samples[middle - 1 : middle + 1]) / 2
        found["prefill" if row["n_prompt"] else "decode"] = median
    if not found:
        raise TurnFailed(f"llama-bench printed no result: {text[-400:]!r}")
    return Speeds(found.get("prefill"), found.get("decode"))


def parse_timings(text: str) -> Speeds:
    """From the lines that llama.cpp's programs end with."""
    found = {
        match["part"]: 1000 * int(match["tokens"]) / float(match["ms"])
        for match in TIMING.finditer(text)
        if float(match["ms"]) > 0
    }
    if "eval" not in found:
        raise TurnFailed(f"llama.cpp printed no timings: {text[-400:]!r}")
    return Speeds(found.get("prompt eval"), found["eval"])
