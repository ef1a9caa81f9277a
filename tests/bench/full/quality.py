"""What P9 is asked to measure."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench_formats import WINDOWS

NATIVE = "native/native"
FORMATS = (NATIVE, "int8/native", "int8/int8", "int4/native", "int4/int8")


@dataclass(frozen=True, slots=True)
class Quality:
    """Pairs of formats, experts/dense, over so many windows; fewer of both for a quick look."""

    windows: int = WINDOWS
    formats: tuple[str, ...] = FORMATS
    norms: bool = False  # also move what reads a norm, so that no matrix keeps its grid

    @classmethod
    def of(cls, windows: int, formats: Sequence[str], *, norms: bool) -> "Quality":
        """The native formats are the reference, and always measured first."""
        rest = [name for name in formats or FORMATS if name != NATIVE]
        return cls(windows, (NATIVE, *rest), norms)
