"""What guessed reads cost and save: the ledger by itself, with a clock the test turns, and live."""

from collections.abc import Callable

import pytest

from manual_reader import Bench
from moestro.cache import ExpertCache, ExpertKey, Phase
from moestro.cache.policy.guesses import SOON_TURNS, GuessLedger

LAYERS = 3
A, B, C, GUESS, OTHER = (ExpertKey(1, expert) for expert in range(5))

Make = Callable[[int], Bench]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> GuessLedger:
    return GuessLedger(LAYERS, clock)


def pass_events(ledger: GuessLedger, events: int) -> None:
    for _ in range(events):
        ledger.event()


def test_a_late_guess_gained_its_head_start(ledger: GuessLedger, clock: Clock) -> None:
    ledger.begun([GUESS, OTHER], [])
    clock.now_s += 0.25
    ledger.asked([GUESS, OTHER], late=True)
    assert ledger.head_start_s == 0.25  # once, for both: one link carried them
    ledger.begun([GUESS], [])
    clock.now_s += 1
    ledger.asked([GUESS], late=False)
    assert ledger.head_start_s == 0.25


def test_who_left_for_a_wrong_guess_and_is_read_again_counts_once(ledger: GuessLedger) -> None:
    ledger.begun([GUESS], [A, B])
    ledger.missed([A, C])
    assert ledger.rereads == 1
    ledger.missed([A])
    assert ledger.rereads == 1
    ledger.missed([B])
    assert ledger.rereads == 2


@pytest.mark.parametrize("late", [True, False])
def test_who_left_for_a_right_guess_would_have_left_anyway(ledger: GuessLedger, late: bool) -> None:
    ledger.begun([GUESS], [A])
    ledger.begun([OTHER], [B])
    ledger.asked([GUESS], late=late)
    ledger.missed([A])
    assert ledger.rereads == 0
    ledger.missed([B])
    assert ledger.rereads == 1


def test_one_right_guess_of_two_does_not_excuse_the_other(ledger: GuessLedger) -> None:
    ledger.begun([GUESS, OTHER], [A, B])
    ledger.asked([GUESS], late=False)
    ledger.missed([A])
    assert ledger.rereads == 1


def test_who_is_missed_much_later_had_to_leave_anyway(ledger: GuessLedger) -> None:
    ledger.begun([GUESS], [A])
    pass_events(ledger, 1)
    ledger.begun([GUESS], [B])
    pass_events(ledger, SOON_TURNS * LAYERS)
    ledger.missed([A, B])
    assert ledger.rereads == 1  # B, just in time


def test_waits_add_up(ledger: GuessLedger) -> None:
    ledger.waited_behind(0.5)
    ledger.waited_behind(0.25)
    assert ledger.behind_s == 0.75


def run(cache: ExpertCache, layer: int, experts: list[int]) -> None:
    with cache.acquire(layer, experts, Phase.DECODE) as lease:
        for _ in lease:
            pass
    cache.check()


class TestInACache:
    def test_a_victim_of_a_wrong_guess_is_read_again(self, bench: Make) -> None:
        made = bench(2)
        run(made.cache, 0, [0, 1])
        made.cache.prefetch(1, [5], 1)
        made.reader.finish_all()
        (gone,) = made.cache.absent(0, [0, 1])
        run(made.cache, 0, [gone])
        assert made.cache.stats().prefetch_rereads == 1

    def test_a_victim_of_a_right_guess_does_not_count(self, bench: Make) -> None:
        made = bench(2)
        run(made.cache, 0, [0, 1])
        made.cache.prefetch(1, [5], 1)
        made.reader.finish_all()
        (gone,) = made.cache.absent(0, [0, 1])
        run(made.cache, 1, [5])
        run(made.cache, 0, [gone])
        assert made.cache.stats().prefetch_rereads == 0

    def test_a_demand_behind_a_foreign_guess_waits_for_it(self, bench: Make) -> None:
        made = bench(6)
        made.cache.prefetch(1, [5], 1)
        run(made.cache, 1, [0])
        stats = made.cache.stats()
        assert stats.prefetch_behind_s > 0
        assert stats.prefetch_behind_s <= stats.decode_stall_s
        assert stats.prefetch_head_start_s == 0

    def test_a_demand_for_the_guess_itself_is_not_behind_it(self, bench: Make) -> None:
        made = bench(6)
        made.cache.prefetch(1, [5], 1)
        run(made.cache, 1, [5])
        stats = made.cache.stats()
        assert stats.prefetch_behind_s == 0
        assert stats.prefetch_head_start_s > 0

    def test_absent_is_who_is_neither_here_nor_coming(self, bench: Make) -> None:
        made = bench(6)
        run(made.cache, 1, [0])
        made.cache.prefetch(1, [5], 1)
        assert made.cache.absent(1, [5, 0, 3, 2]) == [3, 2]
