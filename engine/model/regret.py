"""Whether guessing the next layer's experts is worth what it costs. Pure arithmetic, no tensors.

    MEASURING --a read can hide behind a layer--> WATCHED --a window cost more than it gained--,
        ^   |                                                                                  |
        |   `--it cannot------------------------> PAUSED <-------------------------------------'
        `---------- the pause is over --------------'

A pause is twice as long as the one before, until a window pays. Steps are decode steps: prompts
guess nothing. What is decided here changes when experts arrive, never what is computed.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from statistics import median

from moestro.cache import CacheStats

log = logging.getLogger("moestro.engine")

MEASURING_STEPS = 8
WINDOW_STEPS = 16  # one account
FIRST_PAUSE_STEPS = 256
LONGEST_PAUSE_STEPS = 16_384
ENOUGH_READS = 8  # guessed reads whose mean time is believed rather than the start's few


class State(Enum):
    """The picture above says who follows whom."""

    MEASURING = "measuring"
    WATCHED = "watched"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Account:
    """One window: seconds of stall avoided, and seconds spent for it."""

    used: int
    late: int
    rereads: int
    saved_s: float  # reads that were over when their expert was asked for
    head_start_s: float  # reads that were under way by then
    guess_s: float  # computing the guesses
    behind_s: float  # demanded reads behind guessed ones
    reread_s: float  # experts that had left for wrong guesses, read again

    @property
    def gain_s(self) -> float:
        return self.saved_s + self.head_start_s

    @property
    def cost_s(self) -> float:
        return self.guess_s + self.behind_s + self.reread_s

    def __str__(self) -> str:
        return (
            f"cost {_ms(self.cost_s)} ({_ms(self.guess_s)} guessing, {_ms(self.behind_s)} demanded"
            f" reads waiting behind guesses, {_ms(self.reread_s)} reading again {self.rereads}"
            f" experts that had made room) and gained {_ms(self.gain_s)} ({self.used} used,"
            f" {self.late} late)"
        )


def account_of(before: CacheStats, now: CacheStats, guess_s: float, read_s: float) -> Account:
    """Of what was counted between two snapshots. `read_s`: one guessed read, if none was made.

    A read that computing hides anyway is no stall, whoever asks for it: reads count by the share
    of the demanded reads' time that was waited for.
    """
    loads = now.prefetch_loads - before.prefetch_loads
    if loads:
        read_s = (now.prefetch_read_s - before.prefetch_read_s) / loads
    demand_s = now.demand_read_s - before.demand_read_s
    stall_s = now.prefill_stall_s - before.prefill_stall_s
    stall_s += now.decode_stall_s - before.decode_stall_s
    exposed = min(1.0, stall_s / demand_s) if demand_s else 1.0
    used = now.prefetches_used - before.prefetches_used
    rereads = now.prefetch_rereads - before.prefetch_rereads
    head_start_s = now.prefetch_head_start_s - before.prefetch_head_start_s
    return Account(
        used=used,
        late=now.prefetches_late - before.prefetches_late,
        rereads=rereads,
        saved_s=exposed * used * read_s,
        head_start_s=exposed * head_start_s,
        guess_s=guess_s,
        behind_s=now.prefetch_behind_s - before.prefetch_behind_s,
        reread_s=exposed * rereads * read_s,
    )


class Regret:
    """Told of every decode step; `on` says whether to guess in the next one."""

    def __init__(self, read_s: float, facts: Callable[[], CacheStats]) -> None:
        """`read_s`: one expert over the slowest link. `facts` is asked once per window."""
        self.state = State.MEASURING
        self.read_s = read_s
        self.layer_s: float | None = None  # None until it was measured
        self.gain_s = 0.0  # over all windows
        self.cost_s = 0.0
        self.pauses = 0
        self._facts = facts
        self._before = facts()
        self._steps_left = MEASURING_STEPS
        self._layers_s: list[float] = []
        self._guess_s = 0.0
        self._pause_steps = FIRST_PAUSE_STEPS
        self._swept = self._begins_anew = False

    @property
    def on(self) -> bool:
        return self.state is not State.PAUSED

    @property
    def measuring(self) -> bool:
        """`step` wants to know how long a layer took."""
        return self.state is State.MEASURING

    def guessed(self, seconds: float) -> None:
        """A guess was computed and started."""
        self._guess_s += seconds

    def swept(self) -> None:
        """This step reads whole layers ahead, without a guess: it is no part of an account."""
        self._swept = True

    def step(self, layer_s: float | None = None) -> None:
        """A decode step is over; `layer_s`, from one layer's demand to the next without stalls."""
        if self._swept:
            self._swept, self._begins_anew = False, True
            return
        if self._begins_anew and self.state is not State.PAUSED:
            measures = self.state is State.MEASURING
            self._begin(self.state, MEASURING_STEPS if measures else WINDOW_STEPS)
        if layer_s is not None:
            self._layers_s.append(layer_s)
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        if self.state is State.MEASURING:
            self._decide()
        elif self.state is State.WATCHED:
            self._settle()
        else:
            log.info("prefetch: on for a trial, after %d decode steps without", self._pause_steps)
            self._pause_steps = min(2 * self._pause_steps, LONGEST_PAUSE_STEPS)
            self._begin(State.MEASURING, MEASURING_STEPS)

    def _decide(self) -> None:
        """Can a read of one expert hide behind a layer at all?"""
        if not self._layers_s:  # no step went through all layers: measure on
            self._steps_left = MEASURING_STEPS
            return
        now = self._facts()
        loads = now.prefetch_loads - self._before.prefetch_loads
        if loads >= ENOUGH_READS:  # as they are made while serving, over every link there is
            self.read_s = (now.prefetch_read_s - self._before.prefetch_read_s) / loads
        self.layer_s = median(self._layers_s)
        self._layers_s.clear()
        if self.read_s <= self.layer_s:
            log.info(
                "prefetch: on, one expert takes %s of the %s of a layer",
                _ms(self.read_s),
                _ms(self.layer_s),
            )
            self._begin(State.WATCHED, WINDOW_STEPS)
            return
        log.info(
            "prefetch: off, one expert takes %s and a layer only %s: no read could hide behind it;"
            " tried again after %d decode steps",
            _ms(self.read_s),
            _ms(self.layer_s),
            self._pause_steps,
        )
        self._pause()

    def _settle(self) -> None:
        account = account_of(self._before, self._facts(), self._guess_s, self.read_s)
        self.gain_s += account.gain_s
        self.cost_s += account.cost_s
        if account.cost_s <= account.gain_s:
            self._pause_steps = FIRST_PAUSE_STEPS
            self._begin(State.WATCHED, WINDOW_STEPS)
            return
        log.warning(
            "prefetch: off, the last %d decode steps %s; tried again after %d decode steps",
            WINDOW_STEPS,
            account,
            self._pause_steps,
        )
        self._pause()

    def _pause(self) -> None:
        self.pauses += 1
        self._begin(State.PAUSED, self._pause_steps)

    def _begin(self, state: State, steps: int) -> None:
        self.state, self._steps_left, self._begins_anew = state, steps, False
        self._before, self._guess_s = self._facts(), 0.0


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.{2 if seconds < 0.01 else 0}f} ms"
