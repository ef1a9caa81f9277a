"""Reads one JSON value character by character, and knows at each whether it is still JSON.

It keeps no text: whoever feeds it does. One thing is forgiven: control characters inside strings,
which models write and `handed_on` turns into escapes.
"""

import re
from enum import Enum, auto

# A client's parser must be able to follow.
MAX_DEPTH = 200
MAX_SCALAR_CHARS = 400

SPACES = " \t\n\r"
_SCALAR = re.compile(r"(?:true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)")
_IN_SCALAR = frozenset("-+.0123456789truefalsnE")
_FIRST_OF_SCALAR = frozenset("-0123456789tfn")
_HEX = frozenset("0123456789abcdefABCDEF")


class Outcome(Enum):
    """What a character was to a value."""

    MORE = auto()  # a part of it, and more must come
    DONE = auto()  # its last
    PAST = auto()  # not a part of it: the value, a number or a word, ended before
    BROKEN = auto()  # this cannot become JSON


class _State(Enum):
    VALUE = auto()
    FIRST_ITEM = auto()  # a value, or the end of an empty array
    FIRST_KEY = auto()  # a key, or the end of an empty object
    KEY = auto()
    COLON = auto()
    AFTER = auto()  # a comma, or the end of what holds the value
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    SCALAR = auto()


class JsonValue:
    """One JSON value of any kind; leading whitespace counts as a part of it."""

    def __init__(self) -> None:
        self._state = _State.VALUE
        self._closers: list[str] = []  # of the objects and arrays that are open
        self._string_is_key = False
        self._hex_left = 0
        self._scalar = ""

    @property
    def in_string(self) -> bool:
        return self._state in (_State.STRING, _State.ESCAPE, _State.HEX)

    def step(self, char: str) -> Outcome:
        match self._state:
            case _State.STRING | _State.ESCAPE | _State.HEX:
                return self._in_string(char)
            case _State.SCALAR:
                return self._in_scalar(char)
            case _ if char in SPACES:
                return Outcome.MORE
            case _State.VALUE | _State.FIRST_ITEM:
                return self._value(char)
            case _State.KEY | _State.FIRST_KEY:
                return self._key(char)
            case _State.COLON:
                return self._go(_State.VALUE) if char == ":" else Outcome.BROKEN
            case _State.AFTER:
                return self._after(char)

    def _go(self, state: _State) -> Outcome:
        self._state = state
        return Outcome.MORE

    def _value(self, char: str) -> Outcome:
        if char == '"':
            self._string_is_key = False
            return self._go(_State.STRING)
        if char == "{":
            return self._open("}", _State.FIRST_KEY)
        if char == "[":
            return self._open("]", _State.FIRST_ITEM)
        if char == "]" and self._state is _State.FIRST_ITEM:
            return self._close()
        if char in _FIRST_OF_SCALAR:
            self._scalar = char
            return self._go(_State.SCALAR)
        return Outcome.BROKEN

    def _key(self, char: str) -> Outcome:
        if char == '"':
            self._string_is_key = True
            return self._go(_State.STRING)
        if char == "}" and self._state is _State.FIRST_KEY:
            return self._close()
        return Outcome.BROKEN

    def _after(self, char: str) -> Outcome:
        if char == ",":
            return self._go(_State.KEY if self._closers[-1] == "}" else _State.VALUE)
        return self._close() if char == self._closers[-1] else Outcome.BROKEN

    def _open(self, closer: str, state: _State) -> Outcome:
        if len(self._closers) == MAX_DEPTH:
            return Outcome.BROKEN
        self._closers.append(closer)
        return self._go(state)

    def _close(self) -> Outcome:
        self._closers.pop()
        return self._ended()

    def _ended(self) -> Outcome:
        self._state = _State.AFTER
        return Outcome.MORE if self._closers else Outcome.DONE

    def _in_string(self, char: str) -> Outcome:
        if self._state is _State.HEX:
            self._hex_left -= 1
            if char not in _HEX:
                return Outcome.BROKEN
            return self._go(_State.HEX if self._hex_left else _State.STRING)
        if self._state is _State.ESCAPE:
            self._hex_left = 4
            if char == "u":
                return self._go(_State.HEX)
            return self._go(_State.STRING) if char in '"\\/bfnrt' else Outcome.BROKEN
        if char == "\\":
            return self._go(_State.ESCAPE)
        if char != '"':
            return Outcome.MORE
        return self._go(_State.COLON) if self._string_is_key else self._ended()

    def _in_scalar(self, char: str) -> Outcome:
        if char in _IN_SCALAR:
            self._scalar += char
            return Outcome.MORE if len(self._scalar) <= MAX_SCALAR_CHARS else Outcome.BROKEN
        if not _SCALAR.fullmatch(self._scalar):
            return Outcome.BROKEN
        if not self._closers:
            return Outcome.PAST
        self._state = _State.AFTER
        return self.step(char)


def handed_on(char: str) -> str:
    """A character of a JSON string as JSON allows it and UTF-8 can carry it."""
    return f"\\u{ord(char):04x}" if char < " " or "\ud800" <= char <= "\udfff" else char


class Unescaper:
    """Takes the inside of a well-formed JSON string, gives the text it stands for.

    An escaped surrogate comes alone, as Python holds it; its partner follows.
    """

    _SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

    def __init__(self) -> None:
        self._escape = ""

    def step(self, char: str) -> str:
        if not self._escape and char != "\\":
            return char
        self._escape += char
        if self._escape == "\\" or (self._escape[1] == "u" and len(self._escape) < 6):
            return ""
        escape, self._escape = self._escape, ""
        return chr(int(escape[2:], 16)) if escape[1] == "u" else self._SHORT.get(char, char)
