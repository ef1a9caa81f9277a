"""What guessed reads cost and saved, beyond what counting them says. Knows keys and a clock.

late guess       was under way when asked for: its head start is what it saved
foreign guess    a demanded read cannot overtake it: the wait behind it is its cost
displaced        who was evicted for a guess and is read again soon, while nobody has asked for the
                 guessed one. Had it been asked for, somebody would have left for it anyway.
"""

import time
from collections.abc import Callable, Collection, Iterable

from moestro.cache.facts import ExpertKey

SOON_TURNS = 2
"""Turns of all layers, which are steps: who is asked for later might have left by then anyway."""


class GuessLedger:
    """Sums since the start, for reading; the methods are told what happens, as it happens."""

    def __init__(self, layers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.head_start_s = 0.0
        self.behind_s = 0.0
        self.rereads = 0
        self._soon_events = SOON_TURNS * layers
        self._clock = clock
        self._events = 0
        self._begun_s = 0.0  # of the guessed reads under way: all of one submission
        # Who left, for which guesses of one submission, at which event; the oldest first.
        self._displaced: dict[ExpertKey, tuple[set[ExpertKey], int]] = {}

    def event(self) -> None:
        """A layer event begins."""
        self._events += 1

    def begun(self, guessed: Collection[ExpertKey], left: Iterable[ExpertKey]) -> None:
        """Reads of `guessed` are submitted, for which `left` were evicted."""
        self._begun_s = self._clock()
        self._forget_old()
        for key in left:
            self._displaced[key] = (set(guessed), self._events)

    def asked(self, guessed: Collection[ExpertKey], *, late: bool) -> None:
        """An event asks for `guessed`, for the first time: here, or `late`, still moving."""
        if late and guessed:
            self.head_start_s += self._clock() - self._begun_s
        for key, (causes, _) in list(self._displaced.items()):
            causes.difference_update(guessed)
            if not causes:
                del self._displaced[key]

    def missed(self, keys: Iterable[ExpertKey]) -> None:
        """An event has to read `keys`."""
        if not self._displaced:
            return
        self._forget_old()
        for key in keys:
            self.rereads += self._displaced.pop(key, None) is not None

    def waited_behind(self, seconds: float) -> None:
        """A demanded read waited until a guessed one that nobody asks for had ended."""
        self.behind_s += seconds

    def _forget_old(self) -> None:
        oldest = self._events - self._soon_events
        while self._displaced:
            key, (_, event) = next(iter(self._displaced.items()))
            if event >= oldest:
                return
            del self._displaced[key]
