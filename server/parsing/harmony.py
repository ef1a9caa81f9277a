"""Harmony, gpt-oss' format: messages with a header that names a channel and maybe a recipient.

<|channel|>analysis<|message|>…<|end|>
<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
<|start|>assistant<|channel|>final<|message|>…<|return|>
"""

import re
from enum import Enum, auto

from .calls import named_call
from .machine import Calls
from .message import Message

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"

# What stands behind a marker of a header is a few words; whatever is more is no header.
_HEADER_PART = re.compile(r"(?:\s{0,8}\S{1,256}){0,4}\s{0,8}")
_RECIPIENT = re.compile(r"(?<!\S)to=(\S+)")
_FUNCTIONS = "functions."


class _State(Enum):
    HEADER = auto()
    REASONING = auto()
    CONTENT = auto()  # also where a message is over and none has begun
    CALL = auto()


class Harmony:
    """Analysis is reasoning; commentary to a recipient is a call; the rest is content.

    Inside a string of a call a marker is only text, as in the other formats: arguments may be code
    that speaks of harmony. Without tools a call's body is content.
    """

    markers = frozenset({START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN})
    busy = True

    def __init__(self, message: Message, *, tools_allowed: bool) -> None:
        self._message = message
        self._tools_allowed = tools_allowed
        self._calls = Calls(message)
        self._call_is_empty = False
        # The prompt ends within a header: with "<|start|>assistant".
        self._state = _State.HEADER
        self._header: dict[str, str] = {"": ""}  # the text behind each marker
        self._part = ""

    @property
    def in_string(self) -> bool:
        return self._calls.in_string

    def text(self, text: str) -> None:
        match self._state:
            case _State.HEADER:
                self._add_to_header(text)
            case _State.REASONING:
                self._message.reasoning(text)
            case _State.CONTENT:
                self._message.content(text)
            case _State.CALL:
                self._call_is_empty = self._call_is_empty and not text.strip()
                self._message.content(self._calls.take(text))

    def marker(self, marker: str) -> None:
        if self.in_string:
            self.text(marker)
        elif self._state is _State.HEADER and marker == MESSAGE:
            self._begin_body()
        elif self._state is _State.HEADER and marker in (CHANNEL, CONSTRAIN):
            self._header[marker], self._part = "", marker
        elif marker in (START, CHANNEL):
            self._end_body()
            self._state, self._header, self._part = _State.HEADER, {marker: ""}, marker
        elif marker in (END, CALL, RETURN):
            if marker == CALL and self._call_is_empty:
                self._calls.take("{}")
            self._end_body()
            self._state = _State.CONTENT

    def finish(self) -> None:
        self._calls.abandon()
        if self._state is _State.HEADER and not self._is_header():
            self._message.content(self._header[self._part])

    def _end_body(self) -> None:
        self._calls.abandon()
        self._call_is_empty = False

    def _add_to_header(self, text: str) -> None:
        part = self._header[self._part] + text
        self._header[self._part] = part
        begun_well = self._part or "to=".startswith(part.lstrip()[:3])
        if not begun_well or not _HEADER_PART.fullmatch(part):
            self._state = _State.CONTENT
            self._message.content(part)

    def _is_header(self) -> bool:
        """Whether a header that never ended was one: the model wrote markers, or a recipient."""
        return bool(self._part) or self._header[""].lstrip().startswith("to=")

    def _begin_body(self) -> None:
        self._message.section()
        words = self._header.get(CHANNEL, "").split()
        channel = words[0] if words else ""
        to = _RECIPIENT.search(" ".join(self._header.values()))
        recipient = to[1] if to else ""
        name = recipient.removeprefix(_FUNCTIONS)
        is_call = bool(name) and (channel == "commentary" or name != recipient)
        if is_call and self._tools_allowed:
            self._state, self._call_is_empty = _State.CALL, True
            self._calls.begin(named_call(self._message, name))
        else:
            self._state = _State.REASONING if channel == "analysis" else _State.CONTENT
