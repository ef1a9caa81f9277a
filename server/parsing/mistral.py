"""Mistral: `[TOOL_CALLS][{"name": "f", "arguments": {}}]`, later `[TOOL_CALLS]f[ARGS]{}`."""

import re
from enum import Enum, auto

from .calls import named_call, object_call
from .json_value import SPACES
from .machine import Calls
from .message import Message

OPENING, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\s{0,8}")
_IDENTITY = re.compile(r"\s{0,8}[A-Za-z0-9_\-]{0,64}\s{0,8}")


class _State(Enum):
    CONTENT = auto()  # or a call's object, while one is read
    OPENED = auto()  # behind the marker: a list, an object, or a name
    LIST = auto()  # in a list, before an object
    LISTED = auto()  # in a list, behind an object
    NAME = auto()
    IDENTITY = auto()  # between a name and its arguments; not used, the server gives its own


_HEADS = (_State.NAME, _State.IDENTITY)


class Mistral:
    """Both ways of writing calls; several lists or names may follow each other."""

    markers = frozenset({OPENING, CALL_ID, ARGUMENTS})

    def __init__(self, message: Message) -> None:
        self._message = message
        self._calls = Calls(message)
        self._state = _State.CONTENT
        self._after_call = _State.CONTENT
        self._name = self._identity = ""
        self._bracket = ""  # of a list, until something in it is a call

    @property
    def busy(self) -> bool:
        return self._calls.reading or self._state is not _State.CONTENT

    @property
    def in_string(self) -> bool:
        return self._calls.in_string

    def text(self, text: str) -> None:
        while text:
            if self._calls.reading:
                text = self._read(text)
            elif self._state in _HEADS:
                text = self._head(text)
            elif self._state is _State.CONTENT:
                self._message.content(text)
                return
            else:
                text = self._between(text)

    def marker(self, marker: str) -> None:
        if self.in_string or marker not in self.markers:
            self.text(marker)
        elif marker == ARGUMENTS and self._state in _HEADS:
            self._begin_named()
        elif marker == CALL_ID and self._state is _State.NAME:
            self._state = _State.IDENTITY
        else:
            self.finish()
            self._state = _State.OPENED if marker == OPENING else _State.CONTENT
            self._bracket = ""

    def finish(self) -> None:
        self._calls.abandon()
        if self._state in _HEADS:
            self._give_back()

    def _read(self, text: str) -> str:
        """Feeds the call; returns the text behind it."""
        rest = self._calls.take(text)
        if not self._calls.reading:
            self._state = self._after_call if self._calls.well else _State.CONTENT
        return rest

    def _between(self, text: str) -> str:
        """Before or behind an object or a name; returns the text that is not yet used."""
        if text[0] in SPACES:
            return text.lstrip(SPACES)
        match self._state, text[0]:
            case _State.OPENED, "[":
                self._state, self._bracket = _State.LIST, "["
            case ((_State.OPENED | _State.LIST), "{"):
                self._bracket = ""
                self._after_call = _State.LISTED if self._state is _State.LIST else _State.CONTENT
                self._calls.begin(object_call(self._message))
                return text
            case _State.OPENED, _:
                self._state, self._name, self._identity = _State.NAME, "", ""
                return text
            case _State.LISTED, ",":
                self._state = _State.LIST
            case ((_State.LIST | _State.LISTED), "]"):
                self._state = _State.CONTENT
            case _:
                self._state = _State.CONTENT
                return self._bracket + text
        return text[1:]

    def _head(self, text: str) -> str:
        """A name, or an identity behind it; returns the text that is not yet used."""
        before, brace, _ = text.partition("{")
        if self._state is _State.NAME:
            self._name += before
        else:
            self._identity += before
        if not _NAME.fullmatch(self._name) or not _IDENTITY.fullmatch(self._identity):
            self._give_back()
        elif brace:
            self._begin_named()
        return text[len(before) :]

    def _begin_named(self) -> None:
        self._state = self._after_call = _State.CONTENT
        before = self._name + self._identity
        self._calls.begin(named_call(self._message, self._name.rstrip(), before))

    def _give_back(self) -> None:
        self._state = _State.CONTENT
        self._message.content(self._name + self._identity)
