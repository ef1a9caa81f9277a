"""Guessing has to pay: the account of a window, and when it is switched off and tried again."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from fake_engine import STATS
from moestro.engine.model.regret import (
    ENOUGH_READS,
    FIRST_PAUSE_STEPS,
    LONGEST_PAUSE_STEPS,
    MEASURING_STEPS,
    WINDOW_STEPS,
    Regret,
    State,
    account_of,
)

READ_S, LAYER_S = 0.001, 0.004


class Facts:
    """Counters that a test moves on. At first every counter is zero."""

    def __init__(self) -> None:
        self.now = replace(
            STATS.cache,
            prefetch_loads=0,
            prefetch_read_s=0.0,
            demand_read_s=0.0,
            prefill_stall_s=0.0,
            decode_stall_s=0.0,
            prefetches_used=0,
            prefetches_late=0,
            prefetch_rereads=0,
            prefetch_head_start_s=0.0,
            prefetch_behind_s=0.0,
        )

    def __call__(self) -> Any:
        return self.now

    def add(self, **more: Any) -> None:
        sums = {name: getattr(self.now, name) + value for name, value in more.items()}
        self.now = replace(self.now, **sums)


@pytest.fixture
def facts() -> Facts:
    return Facts()


@pytest.fixture
def regret(facts: Facts) -> Regret:
    return Regret(READ_S, facts)


def steps(regret: Regret, count: int, layer_s: float | None = None) -> None:
    for _ in range(count):
        regret.step(layer_s)


def watched(regret: Regret) -> Regret:
    steps(regret, MEASURING_STEPS, LAYER_S)
    assert regret.state is State.WATCHED
    return regret


def guesses(regret: Regret) -> bool:
    return regret.on


class TestAccount:
    def test_a_used_guess_saves_a_read_where_reads_are_waited_for(self, facts: Facts) -> None:
        before = facts.now
        facts.add(prefetch_loads=4, prefetch_read_s=0.008, prefetches_used=3)
        facts.add(demand_read_s=1.0, decode_stall_s=0.25, prefill_stall_s=0.25)
        account = account_of(before, facts.now, guess_s=0.0, read_s=9.9)
        assert account.saved_s == pytest.approx(0.5 * 3 * 0.002)
        assert account.cost_s == 0

    def test_what_computing_hides_anyway_saves_nothing(self, facts: Facts) -> None:
        before = facts.now
        facts.add(prefetch_loads=4, prefetch_read_s=0.008, prefetches_used=3, demand_read_s=1.0)
        assert account_of(before, facts.now, 0.0, READ_S).gain_s == 0

    def test_without_demanded_reads_every_read_would_have_been_waited_for(
        self, facts: Facts
    ) -> None:
        before = facts.now
        facts.add(prefetch_loads=2, prefetch_read_s=0.004, prefetches_used=2)
        assert account_of(before, facts.now, 0.0, READ_S).gain_s == pytest.approx(0.004)

    def test_all_costs(self, facts: Facts) -> None:
        before = facts.now
        facts.add(prefetch_behind_s=0.125, prefetch_rereads=3, prefetch_head_start_s=0.5)
        account = account_of(before, facts.now, guess_s=0.25, read_s=0.5)
        assert (account.guess_s, account.behind_s, account.reread_s) == (0.25, 0.125, 1.5)
        assert account.cost_s == 1.875
        assert account.gain_s == 0.5


class TestCalibration:
    def test_a_read_that_fits_behind_a_layer_keeps_it_on(
        self, regret: Regret, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "moestro.engine")
        assert regret.measuring
        watched(regret)
        assert guesses(regret)
        assert caplog.messages == [
            "prefetch: on, one expert takes 1.00 ms of the 4.00 ms of a layer"
        ]

    def test_a_read_that_is_longer_switches_it_off(
        self, facts: Facts, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "moestro.engine")
        regret = Regret(0.02, facts)
        steps(regret, MEASURING_STEPS, LAYER_S)
        assert not guesses(regret)
        assert (regret.pauses, regret.layer_s) == (1, LAYER_S)
        (message,) = caplog.messages
        assert message.startswith("prefetch: off, one expert takes 20 ms and a layer only 4.00 ms")
        assert f"tried again after {FIRST_PAUSE_STEPS} decode steps" in message

    def test_the_median_layer_counts(self, regret: Regret) -> None:
        steps(regret, 3, 10.0)
        steps(regret, MEASURING_STEPS - 3, LAYER_S)
        assert regret.layer_s == LAYER_S

    def test_reads_that_were_made_count_rather_than_those_of_the_start(
        self, regret: Regret, facts: Facts
    ) -> None:
        facts.add(prefetch_loads=ENOUGH_READS, prefetch_read_s=ENOUGH_READS * 0.03)
        steps(regret, MEASURING_STEPS, LAYER_S)
        assert regret.read_s == pytest.approx(0.03)
        assert not guesses(regret)

    def test_without_a_whole_step_it_measures_on(self, regret: Regret) -> None:
        steps(regret, 3 * MEASURING_STEPS)
        assert regret.measuring
        watched(regret)


class TestPauses:
    def test_a_window_that_costs_more_than_it_gains_ends_it_with_one_warning(
        self, regret: Regret, facts: Facts, caplog: pytest.LogCaptureFixture
    ) -> None:
        watched(regret)
        regret.guessed(0.25)
        facts.add(prefetches_used=3, prefetches_late=1, prefetch_rereads=2)
        steps(regret, WINDOW_STEPS - 1)
        assert guesses(regret)
        regret.step()
        assert not guesses(regret)
        assert (regret.pauses, regret.cost_s) == (1, 0.252)
        assert regret.gain_s == pytest.approx(0.003)
        (record,) = [one for one in caplog.records if one.levelno == logging.WARNING]
        assert record.getMessage() == (
            "prefetch: off, the last 16 decode steps cost 252 ms (250 ms guessing, 0.00 ms demanded"
            " reads waiting behind guesses, 2.00 ms reading again 2 experts that had made room) and"
            " gained 3.00 ms (3 used, 1 late); tried again after 256 decode steps"
        )

    def test_windows_that_pay_go_on(self, regret: Regret, facts: Facts) -> None:
        watched(regret)
        for _ in range(5):
            regret.guessed(0.002)
            facts.add(prefetches_used=3)
            steps(regret, WINDOW_STEPS)
            assert guesses(regret)
        assert regret.gain_s == pytest.approx(5 * 0.003)
        assert regret.cost_s == pytest.approx(5 * 0.002)

    def test_each_window_is_judged_by_itself(self, regret: Regret, facts: Facts) -> None:
        watched(regret)
        facts.add(prefetches_used=1000)
        steps(regret, WINDOW_STEPS)
        regret.guessed(0.001)
        steps(regret, WINDOW_STEPS)
        assert not guesses(regret)

    def test_nothing_gained_and_nothing_spent_is_no_reason(self, regret: Regret) -> None:
        watched(regret)
        steps(regret, 10 * WINDOW_STEPS)
        assert guesses(regret)

    def test_a_pause_ends_in_a_trial_and_each_is_twice_as_long(
        self, regret: Regret, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "moestro.engine")
        pause = FIRST_PAUSE_STEPS
        for _ in range(10):
            fail(regret)
            assert f"tried again after {pause} decode steps" in caplog.messages[-1]
            steps(regret, pause - 1)
            assert not guesses(regret)
            regret.step()
            assert regret.measuring
            assert caplog.messages[-1] == (
                f"prefetch: on for a trial, after {pause} decode steps without"
            )
            pause = min(2 * pause, LONGEST_PAUSE_STEPS)
        assert pause == LONGEST_PAUSE_STEPS

    def test_a_window_that_pays_makes_the_next_pause_short_again(
        self, regret: Regret, caplog: pytest.LogCaptureFixture
    ) -> None:
        fail(regret)
        steps(regret, FIRST_PAUSE_STEPS)
        watched(regret)
        steps(regret, WINDOW_STEPS)  # costs nothing: it pays
        regret.guessed(1.0)
        steps(regret, WINDOW_STEPS)
        assert f"tried again after {FIRST_PAUSE_STEPS} decode steps" in caplog.messages[-1]


def fail(regret: Regret) -> None:
    """Measured, watched, and found not worth it."""
    watched(regret)
    regret.guessed(1.0)
    steps(regret, WINDOW_STEPS)
    assert not guesses(regret)


def test_steps_that_swept_are_in_no_account(regret: Regret, facts: Facts) -> None:
    watched(regret)
    steps(regret, WINDOW_STEPS - 1)
    regret.swept()
    facts.add(prefetches_used=100, prefetch_loads=100, prefetch_read_s=1.0)
    steps(regret, 1)
    steps(regret, WINDOW_STEPS - 1)
    assert regret.state is State.WATCHED and regret.gain_s == 0
    regret.guessed(0.1)
    steps(regret, 1)
    assert regret.gain_s == 0
    assert not regret.on
