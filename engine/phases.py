"""How long each part of a start takes, and how far it has come."""

import time

from moestro.engine.facts import Progress, ProgressFn


class Phases:
    """Seconds by phase, and progress in each."""

    def __init__(self, progress: ProgressFn) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._name, self._since_s = "", 0.0

    def enter(self, name: str) -> None:
        self.leave()
        self._name, self._since_s = name, time.monotonic()

    def leave(self) -> None:
        if self._name:
            self.seconds[self._name] = time.monotonic() - self._since_s
        self._name = ""

    def report(self, done: int, total: int, unit: str) -> None:
        """Also where a stopped start ends: the callback raises."""
        self._progress(Progress(self._name, done, total, unit))
