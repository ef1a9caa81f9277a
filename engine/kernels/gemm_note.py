"""The choice of gemm.py, measured once for a processor and kept beside the pack."""

import json
import logging
import os
import platform
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from .gemm import NEVER, GemmChoice, measure_gemm
from .library import chosen

log = logging.getLogger("moestro.engine")

GEMM_NOTE = "products.json"


def kept_gemm(path: Path, threads: int) -> GemmChoice:
    """What was measured for this processor and so many threads, now or by an earlier start.

    A note that cannot be read or written, or is of another processor, costs measuring again. The
    library has to be here; its own products serve afterwards.
    """
    here = _here(threads)
    found = _read(path, here)
    if found is None:
        found = _measured(here)
        try:
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            aside.write_text(json.dumps({"of": here, **asdict(found)}) + "\n", "utf-8")
            aside.replace(path)
        except OSError as error:
            log.warning("which products are faster could not be kept: %s", error)
    return found


def gemm_line(choice: GemmChoice) -> str:
    """In words, for the log."""
    if not choice.gemm_rate:
        return "int8 of many rows by the library: torch's _int_mm saturates on this processor"
    own, other = (f"{rate / 1e9:.0f} G/s" for rate in (choice.own_rate, choice.gemm_rate))
    rows = f"with {choice.measured_rows} rows"
    if choice.least_rows == NEVER:
        return f"int8 of many rows by the library ({rows} {own}, torch's _int_mm {other})"
    return (
        f"int8 by torch's _int_mm from {choice.least_rows} rows an expert on"
        f" ({rows} {other}, the library {own})"
    )


@lru_cache
def _measured(here: str) -> GemmChoice:
    """Once in a process; `here` says what it depends on."""
    return measure_gemm()


def _here(threads: int) -> str:
    versions = f"torch {torch.__version__}"
    return f"{_processor()}, {chosen()}, {threads} threads, {versions}"


def _processor() -> str:
    """Its name; of one that says none, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _read(path: Path, here: str) -> GemmChoice | None:
    """None where there is none of this processor."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.pop("of", None) != here:
        return None
    fields = ("least_rows", "measured_rows", "own_rate", "gemm_rate")
    if set(found) != set(fields) or any(type(found[name]) not in (int, float) for name in fields):
        return None
    rows = int(found["least_rows"]), int(found["measured_rows"])
    return GemmChoice(*rows, float(found["own_rate"]), float(found["gemm_rate"]))
