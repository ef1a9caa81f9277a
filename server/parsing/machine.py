"""What the formats share: reading calls one after another out of text."""

from typing import Protocol

from .calls import CallReader
from .json_value import Outcome
from .message import Message


class Machine(Protocol):
    """Knows one format. It is given the answer's text, already cut at markers."""

    @property
    def busy(self) -> bool:
        """Whether something was begun, a call for one, that is not over."""

    @property
    def in_string(self) -> bool:
        """Whether the text is inside a string of a call, where a marker is only text."""

    def text(self, text: str) -> None: ...

    def marker(self, marker: str) -> None: ...

    def finish(self) -> None:
        """The text is over. What is left of a call that is none goes to the content."""


class Plain:
    """No tools: all is content."""

    busy = False
    in_string = False

    def __init__(self, message: Message) -> None:
        self.text = message.content
        self.marker = message.content

    def finish(self) -> None:
        pass


class Calls:
    """Holds the call that is being read, if one is."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._reader: CallReader | None = None
        self.well = True  # whether the last call was read to its end

    @property
    def reading(self) -> bool:
        return self._reader is not None

    @property
    def in_string(self) -> bool:
        return self._reader is not None and self._reader.in_string

    def begin(self, reader: CallReader) -> None:
        self.abandon()
        self._reader = reader

    def take(self, text: str) -> str:
        """Reads until the call ends or breaks; returns the text behind it."""
        if self._reader is None:
            return text
        for number, char in enumerate(text):
            outcome = self._reader.step(char)
            if outcome is not Outcome.MORE:
                self._end(well=outcome is Outcome.DONE)
                return text[number + 1 :]
        return ""

    def abandon(self) -> None:
        """Whatever was being read is over; text that is in no call is content."""
        if self._reader is not None:
            self._end(well=False)

    def _end(self, *, well: bool) -> None:
        assert self._reader is not None
        text = self._reader.given_back()
        self._reader, self.well = None, well
        if not well:
            self._message.content(text)
