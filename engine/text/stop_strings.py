"""Stop strings in a text that comes piece by piece. Knows nothing of tokens."""

from typing import NamedTuple


class Found(NamedTuple):
    end_chars: int  # of the pushed piece, read when the stop string was complete
    length_chars: int  # of the stop string; it may have begun in an earlier piece


class StopStrings:
    """The first of the stop strings to be complete; of several that end there, the longest.

    Reads each character once for each stop string, however the text is cut (Knuth, Morris, Pratt).
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        """No stop string may be empty."""
        self._stop = [(one, _fallbacks(one)) for one in stop]
        self._matched = [0] * len(stop)

    @property
    def any(self) -> bool:
        return bool(self._stop)

    @property
    def open_chars(self) -> int:
        """How much of the text's end may still become a stop string."""
        return max(self._matched, default=0)

    def push(self, text: str) -> Found | None:
        if not self._stop:
            return None
        for place, char in enumerate(text):
            length = self._advance(char)
            if length:
                return Found(place + 1, length)
        return None

    def _advance(self, char: str) -> int:
        """The length of the longest stop string that `char` completes."""
        complete = 0
        for number, (stop, fallbacks) in enumerate(self._stop):
            matched = _next(stop, fallbacks, self._matched[number], char)
            self._matched[number] = matched
            if matched == len(stop):
                complete = max(complete, matched)
        return complete


def _next(stop: str, fallbacks: list[int], matched: int, char: str) -> int:
    while matched and (matched == len(stop) or stop[matched] != char):
        matched = fallbacks[matched - 1]
    return matched + (stop[matched] == char)


def _fallbacks(stop: str) -> list[int]:
    """For each start of it: the length of its longest end that also begins it."""
    found = [0]
    for char in stop[1:]:
        found.append(_next(stop, found, found[-1], char))
    return found
