"""What checks of a GPU find, and the boundary behind which one of them may fail in any way.

A run that somebody gives on a machine that we never see must not be lost to one fault: what a check
had found before it failed is kept, with the whole traceback, and the next one runs.
"""

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

log = logging.getLogger("moestro.engine")


class CannotRun(Exception):
    """This machine has not what the check needs; one line says what."""


class Status(Enum):
    """WAITING -> RUNNING -> PASSED, FAILED or INTERRUPTED; WAITING or RUNNING -> NOT_RUN."""

    WAITING = "waiting"
    RUNNING = "running"  # in a file: the process ended in the midst of it
    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"
    INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Found:
    """Grows while a check runs. Facts are what JSON can hold, with units in their names."""

    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)  # for people
    problems: list[str] = field(default_factory=list)  # what should be otherwise: the check failed


@dataclass(slots=True)
class Outcome:
    """One check as the report has it."""

    name: str
    status: Status = Status.WAITING
    why: str = ""  # it was not run
    took_s: float = 0.0
    found: Found = field(default_factory=Found)
    warnings: list[str] = field(default_factory=list)  # that the program logged meanwhile
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """`run` adds to what it is given as it goes. Raises CannotRun, or anything."""

    name: str
    run: Callable[[Found], None]
    cannot: str = ""  # why not here, known beforehand


def run_checks(
    checks: Sequence[Check],
    left_s: Callable[[], float],
    keep: Callable[[Sequence[Outcome]], None],
    tidy: Callable[[], None],
) -> list[Outcome]:
    """One after another; `keep` is told before and after each, also when it is interrupted.

    None begins once `left_s` is used up. `tidy` gives back what the last one had, as a part of the
    next: where it fails, that one does.
    """
    outcomes = [Outcome(check.name) for check in checks]
    for check, outcome in zip(checks, outcomes, strict=True):
        if check.cannot or left_s() <= 0:
            outcome.status = Status.NOT_RUN
            outcome.why = check.cannot or "no time was left"
            continue
        outcome.status = Status.RUNNING
        try:
            keep(outcomes)
            _run(check, outcome, tidy)
        finally:
            if outcome.status is Status.RUNNING:
                outcome.status = Status.INTERRUPTED
            keep(outcomes)
    keep(outcomes)
    return outcomes


def _run(check: Check, outcome: Outcome, tidy: Callable[[], None]) -> None:
    began_s = time.monotonic()
    try:
        with _heard(outcome.warnings):
            tidy()
            check.run(outcome.found)
        outcome.status = Status.FAILED if outcome.found.problems else Status.PASSED
    except CannotRun as reason:
        outcome.status, outcome.why = Status.NOT_RUN, str(reason)
    except Exception:  # the boundary of one check: the others run, the report has the traceback
        log.exception("gpu-check: %s failed", check.name)
        outcome.status, outcome.traceback = Status.FAILED, traceback.format_exc()
    finally:
        outcome.took_s = time.monotonic() - began_s


class _Listener(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()) not in self._heard:
            self._heard.append(message)


@contextmanager
def _heard(heard: list[str]) -> Iterator[None]:
    """What moestro warns of inside goes into the list, too."""
    listener, logger = _Listener(heard), logging.getLogger("moestro")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
