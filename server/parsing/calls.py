"""Reads one tool call, and begins it in the message once it is sure to be one.

Until then its text is kept, so that it can be given back as content. A call once begun cannot be
taken back: where it breaks later, its arguments end there, and the rest of its text is content.
"""

import json
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from .json_value import SPACES, JsonValue, Outcome, Unescaper, handed_on
from .message import Message

_ARGUMENT_KEYS = ("arguments", "parameters")
# What a model may write beside them where nothing but these keys says that it is a call.
_KNOWN_KEYS = frozenset({"name", "type", "id", *_ARGUMENT_KEYS})


class _Value(Protocol):
    """Whatever reads one JSON value."""

    @property
    def in_string(self) -> bool: ...

    def step(self, char: str) -> Outcome: ...


class _PlainArguments:
    """An object, written as it is; a leading space is not handed on."""

    def __init__(self, hand_on: Callable[[str], None]) -> None:
        self._hand_on = hand_on
        self._object = JsonValue()
        self._begun = False

    @property
    def in_string(self) -> bool:
        return self._object.in_string

    def step(self, char: str) -> Outcome:
        if not self._begun:
            if char in SPACES:
                return Outcome.MORE
            if char != "{":
                return Outcome.BROKEN
            self._begun = True
        text = handed_on(char) if self.in_string else char
        outcome = self._object.step(char)
        if outcome is not Outcome.BROKEN:
            self._hand_on(text)
        return outcome


class _WrappedArguments:
    """An object inside a JSON string, as some models write it: the object is handed on."""

    def __init__(self, hand_on: Callable[[str], None]) -> None:
        self._hand_on = hand_on
        self._string = JsonValue()
        self._unescaper = Unescaper()
        self._object = _PlainArguments(hand_on)
        self._inside = Outcome.MORE
        self._empty = True

    @property
    def in_string(self) -> bool:
        return self._string.in_string

    def step(self, char: str) -> Outcome:
        was_inside = self.in_string
        outcome = self._string.step(char)
        if outcome is Outcome.DONE:
            return self._end()
        if was_inside and outcome is Outcome.MORE:
            return self._step_inside(self._unescaper.step(char))
        return outcome

    def _step_inside(self, char: str) -> Outcome:
        """`char` is one character of the object, or nothing where an escape is not over."""
        if not char or (char in SPACES and self._inside is Outcome.DONE):
            return Outcome.MORE
        if self._inside is Outcome.DONE:
            return Outcome.BROKEN
        self._empty = self._empty and char in SPACES
        self._inside = self._object.step(char)
        return Outcome.BROKEN if self._inside is Outcome.BROKEN else Outcome.MORE

    def _end(self) -> Outcome:
        if self._empty:
            self._hand_on("{}")
        return Outcome.DONE if self._empty or self._inside is Outcome.DONE else Outcome.BROKEN


class _NoArguments:
    """`null`, which some models write for no arguments."""

    def __init__(self, hand_on: Callable[[str], None]) -> None:
        self._hand_on = hand_on
        self._word = ""

    in_string = False

    def step(self, char: str) -> Outcome:
        self._word += char
        if not "null".startswith(self._word):
            return Outcome.BROKEN
        if self._word != "null":
            return Outcome.MORE
        self._hand_on("{}")
        return Outcome.DONE


def _arguments_reader(first: str, hand_on: Callable[[str], None]) -> _Value:
    """What reads arguments that begin with the character `first`, which it has yet to be given."""
    kinds: dict[str, Callable[[Callable[[str], None]], _Value]]
    kinds = {'"': _WrappedArguments, "n": _NoArguments}
    return kinds.get(first, _PlainArguments)(hand_on)


class _Call:
    """What is kept of a call until its name and the beginning of its arguments are known."""

    def __init__(self, message: Message, name: str | None) -> None:
        self._message = message
        self.name = name
        self.begun = False
        self._arguments: list[str] = []

    @property
    def has_arguments(self) -> bool:
        return self.begun or bool(self._arguments)

    def arguments(self, text: str) -> None:
        if self.begun:
            self._message.arguments(text)
        else:
            self._arguments.append(text)
            self.begin()

    def begin(self) -> None:
        """Begins the call in the message, if all that takes is there."""
        if self.name is not None and self._arguments and not self.begun:
            self.begun = True
            self._message.begin_call(self.name)
            self._message.arguments("".join(self._arguments))
            self._arguments.clear()


class CallReader:
    """Feeds a call's text, character by character, to what reads its kind."""

    def __init__(self, call: _Call, value: _Value, before: str) -> None:
        self._call = call
        self._value = value
        self._kept = [before]

    @property
    def in_string(self) -> bool:
        return self._value.in_string

    def step(self, char: str) -> Outcome:
        outcome = self._value.step(char)
        if self._call.begun:
            self._kept.clear()
            if outcome is Outcome.BROKEN:
                self._kept.append(char)
        else:
            self._kept.append(char)
        return outcome

    def given_back(self) -> str:
        """The text that is in no call, once the reading is over."""
        return "".join(self._kept)


def named_call(message: Message, name: str, before: str = "") -> CallReader:
    """Reads the arguments of a call whose name is known.

    `before`: the call's text so far, for the case that it is none.
    """
    call = _Call(message, name)
    return CallReader(call, _PlainArguments(call.arguments), before)


def object_call(message: Message) -> CallReader:
    """Reads `{"name": "f", "arguments": {}}` where a marker has said that it is a call.

    "parameters" may stand for "arguments"; neither means none; other keys are passed over.
    """
    call = _Call(message, None)
    return CallReader(call, _CallObject(call, unmarked=False), "")


def unmarked_call(message: Message) -> CallReader:
    """Reads `{"name": "f", "parameters": {}}` where an object could also be an answer.

    It is a call with a name, with parameters, and without a key that calls do not have.
    """
    call = _Call(message, None)
    return CallReader(call, _CallObject(call, unmarked=True), "")


class _Expect(Enum):
    OPEN = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    AFTER = auto()


class _CallObject:
    """The object around a call's name and arguments, whatever their order."""

    def __init__(self, call: _Call, *, unmarked: bool) -> None:
        self._call = call
        self._unmarked = unmarked
        self._expect = _Expect.OPEN
        self._value: _Value | None = None  # the key or value that is being read
        self._text: list[str] = []  # of that key, or of the name
        self._key: str | None = None  # whose value is being read; None: the key itself is

    @property
    def in_string(self) -> bool:
        # A name or a key has no business with markers: one there says that the call is none.
        return self._value is not None and self._key in _ARGUMENT_KEYS and self._value.in_string

    def step(self, char: str) -> Outcome:
        if self._value is None:
            return self._between(char)
        if self._key in (None, "name"):
            self._text.append(handed_on(char) if self._value.in_string else char)
        outcome = self._value.step(char)
        if outcome in (Outcome.DONE, Outcome.PAST):
            well = self._take_key() if self._key is None else self._take_value(self._key)
            if not well:
                return Outcome.BROKEN
            return self._between(char) if outcome is Outcome.PAST else Outcome.MORE
        return outcome

    def _between(self, char: str) -> Outcome:
        if char in SPACES:
            return Outcome.MORE
        match self._expect, char:
            case _Expect.OPEN, "{":
                self._expect = _Expect.FIRST_KEY
            case _Expect.FIRST_KEY | _Expect.KEY, '"':
                return self._read(None, JsonValue(), char)
            case _Expect.COLON, ":":
                self._expect = _Expect.VALUE
            case _Expect.VALUE, _:
                return self._read(self._key, self._reader(char), char)
            case _Expect.AFTER, ",":
                self._expect = _Expect.KEY
            case _Expect.AFTER, "}":
                return self._end()
            case _:
                return Outcome.BROKEN
        return Outcome.MORE

    def _read(self, key: str | None, value: _Value, char: str) -> Outcome:
        self._key, self._value = key, value
        self._text.clear()
        return self.step(char)

    def _reader(self, first: str) -> _Value:
        if self._key in _ARGUMENT_KEYS and not self._call.has_arguments:
            return _arguments_reader(first, self._call.arguments)
        return JsonValue()

    def _take_key(self) -> bool:
        key = str(json.loads("".join(self._text)))
        self._key, self._value, self._expect = key, None, _Expect.COLON
        return not self._unmarked or key in _KNOWN_KEYS or self._call.begun

    def _take_value(self, key: str) -> bool:
        self._value, self._expect = None, _Expect.AFTER
        return key != "name" or self._call.name is not None or self._take_name()

    def _take_name(self) -> bool:
        text = "".join(self._text)
        name = json.loads(text) if text.startswith('"') else None
        # A lone surrogate, which an escape can hold, is no text.
        if not name or any("\ud800" <= char <= "\udfff" for char in name):
            return False
        self._call.name = name
        self._call.begin()
        return True

    def _end(self) -> Outcome:
        if not self._call.has_arguments and not self._unmarked:
            self._call.arguments("{}")
        return Outcome.DONE if self._call.begun else Outcome.BROKEN
