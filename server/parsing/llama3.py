"""Llama 3: `{"name": "f", "parameters": {}}` as the whole answer, calls parted by `;`."""

from .calls import object_call, unmarked_call
from .json_value import SPACES
from .machine import Calls
from .message import Message

TAG = "<|python_tag|>"


class Llama3:
    """A call may stand at the beginning, behind the tag, and behind another call.

    Behind the tag anything but an object (code, for the tools this server does not run) is content.
    """

    markers = frozenset({TAG})

    def __init__(self, message: Message) -> None:
        self._message = message
        self._calls = Calls(message)
        self._may_begin = True
        self._marked = False
        self._behind_call = False

    @property
    def busy(self) -> bool:
        return self._calls.reading

    @property
    def in_string(self) -> bool:
        return self._calls.in_string

    def text(self, text: str) -> None:
        while text:
            if self._calls.reading:
                text = self._calls.take(text)
                self._may_begin = self._behind_call = self._calls.well
            elif self._may_begin:
                text = self._begin(text)
            else:
                self._message.content(text)
                return

    def _begin(self, text: str) -> str:
        """Looks for the beginning of a call; returns the text that is not yet used."""
        rest = text.lstrip(SPACES)
        self._message.content(text[: len(text) - len(rest)])
        if rest.startswith(";") and self._behind_call:
            self._behind_call = False
            return rest[1:]
        self._may_begin = rest[:1] in ("", "{")
        if rest.startswith("{"):
            reader = object_call if self._marked else unmarked_call
            self._calls.begin(reader(self._message))
        return rest

    def marker(self, marker: str) -> None:
        if self.in_string:
            self.text(marker)
            return
        self._calls.abandon()
        self._may_begin, self._marked, self._behind_call = True, True, False

    def finish(self) -> None:
        self._calls.abandon()
