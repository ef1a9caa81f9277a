"""The boundary of a check: whatever one does, the report has it and the others run."""

import logging
from collections.abc import Callable, Sequence

import pytest

from moestro.engine.gpu_check import Check, Found, Outcome, Status, run_checks
from moestro.engine.gpu_check.found import CannotRun


def fine(found: Found) -> None:
    found.facts["speed_bytes_per_s"] = 3.0
    found.lines.append("3 B/s")


def broken(found: Found) -> None:
    found.facts["half_s"] = 1.0
    raise ZeroDivisionError("planted")


def disappointed(found: Found) -> None:
    found.problems.append("other tokens")


def unable(found: Found) -> None:
    raise CannotRun("no such library")


def warned(found: Found) -> None:
    for _ in range(2):
        logging.getLogger("moestro.cache").warning("refused to pin %d bytes", 7)


class Kept:
    """What a report would have had in it, time after time."""

    def __init__(self) -> None:
        self.states: list[list[Status]] = []

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        self.states.append([outcome.status for outcome in outcomes])


def outcomes_of(
    *runs: Callable[[Found], None], left_s: Callable[[], float] = lambda: 1.0
) -> tuple[list[Outcome], Kept]:
    kept = Kept()
    checks = [Check(run.__name__, run) for run in runs]
    return run_checks(checks, left_s, kept, lambda: None), kept


def test_a_planted_fault_leaves_the_others_and_its_traceback() -> None:
    (first, second, third), _ = outcomes_of(fine, broken, fine)
    assert [one.status for one in (first, second, third)] == [
        Status.PASSED,
        Status.FAILED,
        Status.PASSED,
    ]
    assert second.found.facts == {"half_s": 1.0}
    assert "in broken" in second.traceback
    assert second.traceback.endswith("ZeroDivisionError: planted\n")
    assert third.found.facts == first.found.facts == {"speed_bytes_per_s": 3.0}


def test_every_step_is_kept() -> None:
    _, kept = outcomes_of(fine, broken)
    waiting, running, passed, failed = (
        Status.WAITING,
        Status.RUNNING,
        Status.PASSED,
        Status.FAILED,
    )
    assert kept.states == [
        [running, waiting],
        [passed, waiting],
        [passed, running],
        [passed, failed],
        [passed, failed],
    ]


def test_a_problem_fails_and_what_cannot_run_does_not() -> None:
    (first, second), _ = outcomes_of(disappointed, unable)
    assert first.status is Status.FAILED
    assert (second.status, second.why) == (Status.NOT_RUN, "no such library")


def test_what_is_warned_of_is_kept_once() -> None:
    (first, second), _ = outcomes_of(warned, fine)
    assert first.warnings == ["refused to pin 7 bytes"]
    assert second.warnings == []


def test_without_time_nothing_begins() -> None:
    left = iter([1.0, 0.0])
    (first, second), _ = outcomes_of(fine, fine, left_s=lambda: next(left))
    assert (first.status, second.status) == (Status.PASSED, Status.NOT_RUN)
    assert second.why == "no time was left"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_goes_on_and_is_kept(kind: type[BaseException]) -> None:
    def interrupted(found: Found) -> None:
        found.facts["half_s"] = 1.0
        raise kind

    kept = Kept()
    checks = [Check("fine", fine), Check("interrupted", interrupted), Check("last", fine)]
    with pytest.raises(kind):
        run_checks(checks, lambda: 1.0, kept, lambda: None)
    assert kept.states[-1] == [Status.PASSED, Status.INTERRUPTED, Status.WAITING]


def test_a_device_that_gives_nothing_back_fails_the_checks_and_not_the_run() -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: illegal address")

    checks = [Check("first", fine), Check("second", fine)]
    found = run_checks(checks, lambda: 1.0, Kept(), lost)
    assert [one.status for one in found] == [Status.FAILED, Status.FAILED]
    assert "illegal address" in found[1].traceback


def test_an_interruption_while_the_report_is_written_is_one_of_the_check() -> None:
    states: list[Status] = []

    def keep(outcomes: Sequence[Outcome]) -> None:
        states.append(outcomes[0].status)
        if len(states) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks([Check("fine", fine)], lambda: 1.0, keep, lambda: None)
    assert states == [Status.RUNNING, Status.INTERRUPTED]
