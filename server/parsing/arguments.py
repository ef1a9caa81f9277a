"""Reads the arguments of a call, a JSON object, and hands its text on as it comes."""

from collections.abc import Callable
from typing import Protocol

from .json_value import SPACES, JsonValue, Outcome, Unescaper, handed_on


class Value(Protocol):
    """Whatever reads one JSON value."""

    @property
    def in_string(self) -> bool: ...

    def step(self, char: str) -> Outcome: ...


class PlainArguments:
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


class WrappedArguments:
    """An object inside a JSON string, as some models write it: the object is handed on."""

    def __init__(self, hand_on: Callable[[str], None]) -> None:
        self._hand_on = hand_on
        self._string = JsonValue()
        self._unescaper = Unescaper()
        self._object = PlainArguments(hand_on)
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


class NoArguments:
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


def arguments_reader(first: str, hand_on: Callable[[str], None]) -> Value:
    """What reads arguments that begin with the character `first`, which it has yet to be given."""
    kinds: dict[str, Callable[[Callable[[str], None]], Value]]
    kinds = {'"': WrappedArguments, "n": NoArguments}
    return kinds.get(first, PlainArguments)(hand_on)
