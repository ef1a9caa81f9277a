"""The text of one answer as it grows: what may be sent now, and where a stop string ends it."""

from collections import deque
from dataclasses import dataclass

from .reader import Part, Reader
from .stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token did."""

    text: str  # may be sent now
    token_text: str  # the token's own, held back or not; "" for a part of a character


class TextStream:
    """Text that could still become a stop string is held back; after one has come, `stopped` is
    True and nothing follows.

    Stop strings are looked for in the text with the special tokens' texts, whether these are shown
    or not, from the start of the answer on. All `token_text` together begin with all that is let
    out, and are that if no stop string came. With `include_stop` as much of the stop string is let
    out as is shown.
    """

    def __init__(self, reader: Reader, stop: tuple[str, ...], include_stop: bool) -> None:
        self._reader = reader
        self._stops = StopStrings(stop)
        self._include_stop = include_stop
        self._held: deque[Part] = deque()
        self._held_chars = 0
        self.stopped = False

    def push(self, token_id: int) -> Piece:
        """Costs no more, however long the answer is. After the stop string: nothing."""
        if self.stopped:
            return Piece("", "")
        parts = self._reader.push(token_id)
        own = "".join(part.text for part in parts if part.shown)
        if not self._stops.any:
            return Piece(own, own)
        return Piece("".join(self._take(part) for part in parts), own)

    def finish(self) -> str:
        """What was held back and can no longer become a stop string. Nothing of a character whose
        bytes have not all come.
        """
        if self.stopped:
            return ""
        text = self._take(Part(self._reader.close(), True))
        return text + self._release(self._held_chars)

    def _take(self, part: Part) -> str:
        if self.stopped or not part.text:
            return ""
        before_chars = self._held_chars
        self._held.append(part)
        self._held_chars += len(part.text)
        found = self._stops.push(part.text)
        if found is None:
            return self._release(self._held_chars - self._stops.open_chars)
        self.stopped = True
        end_chars = before_chars + found.end_chars
        return self._release(end_chars - (0 if self._include_stop else found.length_chars))

    def _release(self, chars: int) -> str:
        """Take so many from the front of what is held; what of it is shown."""
        self._held_chars -= chars
        out = ""
        while chars:
            text, shown = self._held.popleft()
            if len(text) > chars:
                self._held.appendleft(Part(text[chars:], shown))
            out += text[:chars] if shown else ""
            chars -= min(chars, len(text))
        return out
