"""Qwen3-Coder: `<tool_call><function=f><parameter=x>1</parameter></function></tool_call>`."""

import json
import re
from collections.abc import Mapping
from enum import Enum, auto

from .json_value import JsonValue, Outcome, handed_on
from .message import Message

OPENING, CLOSING = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_NAME = re.compile(r"[^\s<>]{0,256}")


class _State(Enum):
    OUTSIDE = auto()
    NAME = auto()  # of the function, up to ">"
    BODY = auto()  # between parameters
    KEY = auto()  # of a parameter, up to ">"
    VALUE = auto()


class QwenXml:
    """Values come without types: what is JSON and no string is handed on as it is, the rest quoted.

    `text_parameters`: by function, the parameters whose values are text whatever they look like.

    A value is given when it is over. Only its own closing marker ends it: the others may be a part
    of it, where the model writes about them.
    """

    markers = frozenset({OPENING, CLOSING, FUNCTION, END_FUNCTION, PARAMETER, END_PARAMETER})

    def __init__(self, message: Message, text_parameters: Mapping[str, frozenset[str]]) -> None:
        self._message = message
        self._text_parameters = text_parameters
        self._are_text = frozenset[str]()  # parameters of the function that is being called
        self._state = _State.OUTSIDE
        self._name = ""  # of the function or the parameter
        self._value: list[str] = []
        self._separator = ""

    @property
    def busy(self) -> bool:
        return self._state is not _State.OUTSIDE

    @property
    def in_string(self) -> bool:
        return self._state is _State.VALUE

    def text(self, text: str) -> None:
        match self._state:
            case _State.VALUE:
                self._value.append(text)
            case _State.NAME | _State.KEY:
                self._take_name(text)
            case _:
                self._message.content(text)

    def marker(self, marker: str) -> None:
        if self._state is _State.VALUE:
            self._in_value(marker)
            return
        self._give_back_name()
        match marker, self._state:
            case "<function=", _State.OUTSIDE:
                self._state = _State.NAME
            case "<parameter=", _State.BODY:
                self._state = _State.KEY
            case "</function>", _State.BODY:
                self._message.arguments("}")
                self._state = _State.OUTSIDE
            case (("<tool_call>" | "</tool_call>"), _):
                self._state = _State.OUTSIDE

    def finish(self) -> None:
        self._give_back_name()
        if self._state is _State.VALUE:
            # Nobody knows what it would have become. Without its last quote it is no value.
            self._give_value(_json_string("".join(self._value).removeprefix("\n"))[:-1])

    def _take_name(self, text: str) -> None:
        before, end, rest = text.partition(">")
        self._name += before
        if not _NAME.fullmatch(self._name) or (end and not self._name):
            self._give_back_name()
            self._message.content(end)
        elif end and self._state is _State.NAME:
            self._message.begin_call(self._name)
            self._message.arguments("{")
            self._are_text = self._text_parameters.get(self._name, frozenset())
            self._state, self._separator, self._name = _State.BODY, "", ""
        elif end:
            self._state = _State.VALUE
        if rest:
            self.text(rest)

    def _give_back_name(self) -> None:
        if self._state in (_State.NAME, _State.KEY):
            self._message.content(self._name)
            self._state = _State.OUTSIDE if self._state is _State.NAME else _State.BODY
            self._name = ""

    def _in_value(self, marker: str) -> None:
        if marker != END_PARAMETER:
            self._value.append(marker)
            return
        text = "".join(self._value).removeprefix("\n").removesuffix("\n")
        self._give_value(_json_string(text) if self._name in self._are_text else _json_of(text))
        self._state = _State.BODY

    def _give_value(self, value: str) -> None:
        self._message.arguments(f"{self._separator}{_json_string(self._name)}: {value}")
        self._separator, self._name = ", ", ""
        self._value.clear()


def _json_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_of(text: str) -> str:
    """`text` itself where it is a JSON value and no string, otherwise a JSON string of it."""
    value, written = JsonValue(), list[str]()
    if text.startswith('"'):
        return _json_string(text)
    # A number is over only where something follows it.
    for number, char in enumerate(f"{text} "):
        written.append(handed_on(char) if value.in_string else char)
        outcome = value.step(char)
        if outcome in (Outcome.DONE, Outcome.PAST):
            used_chars = number + (outcome is Outcome.DONE)
            is_all = not text[used_chars:].strip()
            return "".join(written[:used_chars]) if is_all else _json_string(text)
        if outcome is Outcome.BROKEN:
            break
    return _json_string(text)
