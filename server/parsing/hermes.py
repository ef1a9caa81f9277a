"""Hermes, and Qwen up to 3: `<tool_call>{"name": "f", "arguments": {}}</tool_call>`."""

from .calls import object_call
from .machine import Calls
from .message import Message

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class Hermes:
    """The closing marker only ends what is open: a model may forget it, or its last brace."""

    markers = frozenset({OPENING, CLOSING})

    def __init__(self, message: Message) -> None:
        self._message = message
        self._calls = Calls(message)

    @property
    def busy(self) -> bool:
        return self._calls.reading

    @property
    def in_string(self) -> bool:
        return self._calls.in_string

    def text(self, text: str) -> None:
        self._message.content(self._calls.take(text))

    def marker(self, marker: str) -> None:
        if self.in_string:
            self.text(marker)
        elif marker == OPENING:
            self._calls.begin(object_call(self._message))
        else:
            self._calls.abandon()

    def finish(self) -> None:
        self._calls.abandon()
