"""The message as it grows: what parsers write into, and what a Delta is taken from."""

from collections.abc import Callable

from .deltas import Delta, ToolCallDelta


class _Prose:
    """Text whose outer whitespace is known only later.

    Whitespace at the end waits for what follows. Before a cut (a tool call, another section) it
    is no part of the text; after one the text goes on on a new line.
    """

    def __init__(self, *, trimmed: bool) -> None:
        self._new: list[str] = []
        self._waiting: list[str] = []  # whitespace
        self._trimmed = trimmed  # whether whitespace here is dropped
        self.begun = False

    def write(self, text: str) -> None:
        body = text.rstrip()
        if body:
            self._new.append(self._lead(body))
            self._waiting.clear()
            self.begun, self._trimmed = True, False
        if len(body) < len(text):
            self._waiting.append(text[len(body) :])

    def _lead(self, body: str) -> str:
        if not self._trimmed:
            return "".join(self._waiting) + body
        return ("\n" if self.begun else "") + body.lstrip()

    def cut(self) -> None:
        self._waiting.clear()
        self._trimmed = True

    def finish(self) -> None:
        if not self._trimmed:
            self._new += self._waiting
        self._waiting.clear()

    def take(self) -> str:
        text = "".join(self._new)
        self._new.clear()
        return text


class Message:
    """Collects what the model writes until it is taken, as a Delta."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._content = _Prose(trimmed=False)
        self._reasoning = _Prose(trimmed=True)
        self._new_id = new_id
        self._calls = 0
        self._new_calls: list[tuple[str | None, str | None, list[str]]] = []  # id, name, arguments

    @property
    def begun(self) -> bool:
        """Whether there is an answer: content that is more than whitespace, or a call."""
        return self._content.begun or self._calls > 0

    def content(self, text: str) -> None:
        self._content.write(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.write(text)

    def section(self) -> None:
        """What was written and what follows are apart: whitespace between them is neither's."""
        self._content.cut()
        self._reasoning.cut()

    def begin_call(self, name: str) -> None:
        self.section()
        self._calls += 1
        self._new_calls.append((self._new_id(), name, []))

    def arguments(self, text: str) -> None:
        """Adds to the call that was begun last."""
        if not self._new_calls:
            self._new_calls.append((None, None, []))
        self._new_calls[-1][2].append(text)

    def finish(self) -> None:
        self._content.finish()
        self._reasoning.cut()

    def take(self) -> Delta:
        """What is new since the last time."""
        first = self._calls - len(self._new_calls)
        calls = tuple(
            ToolCallDelta(first + number, "".join(arguments), id=identity, name=name)
            for number, (identity, name, arguments) in enumerate(self._new_calls)
        )
        self._new_calls.clear()
        return Delta(self._content.take(), self._reasoning.take(), calls)
