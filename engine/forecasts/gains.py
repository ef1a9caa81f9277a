"""What a smaller format would gain and cost, where weights are kept as in the checkpoint.

Pure arithmetic and its sentence; token_reads.py counts the bytes.
"""

from dataclasses import dataclass

from moestro.cache import human_bytes

NATIVE = "native"

# Experts/dense -> perplexity over that of native/native. `make bench-full ARGS="p9 --windows 2"`:
# the demo with all 24 experts on, moved off the 4-bit grid of the file it comes from.
DEMO_PERPLEXITY = {("int8", "int8"): 1.008, ("int4", "int8"): 1.017}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one token reads in a pair of formats."""

    expert_format: str
    dense_format: str
    token_bytes: int  # of weights that it is multiplied with

    @property
    def formats(self) -> tuple[str, str]:
        return self.expert_format, self.dense_format


@dataclass(frozen=True, slots=True)
class Gains:
    """Formats of DEMO_PERPLEXITY that read less than `now` does."""

    now: Reading
    smaller: tuple[Reading, ...]  # at least one

    def ratio(self, to: Reading) -> float:
        return to.token_bytes / self.now.token_bytes

    def line(self) -> str:
        first, *others = self.smaller
        parts = [
            f"formats: {_name(self.now)} reads {human_bytes(self.now.token_bytes)} a token",
            f"{_flags(first)} would read {self._size(first)} and costs the demo {_cost(first)}"
            " perplexity",
        ]
        parts += [f"{_flags(one)} {self._size(one)}, {_cost(one)}" for one in others]
        return "; ".join(parts)

    def _size(self, of: Reading) -> str:
        return f"{human_bytes(of.token_bytes)} ({self.ratio(of):.2f} x)"


def gains_over(now: Reading, others: list[Reading]) -> Gains | None:
    """None where nothing is native, or nothing of the others would read less."""
    smaller = tuple(one for one in others if one.token_bytes < now.token_bytes)
    return Gains(now, smaller) if smaller and NATIVE in now.formats else None


def _name(of: Reading) -> str:
    if of.expert_format == of.dense_format:
        return of.expert_format
    return f"{of.expert_format} (dense: {of.dense_format})"


def _flags(of: Reading) -> str:
    return f"--expert-format {of.expert_format} --dense-format {of.dense_format}"


def _cost(of: Reading) -> str:
    return f"{100 * (DEMO_PERPLEXITY[of.formats] - 1):.1f} %"
