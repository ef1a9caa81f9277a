"""Takes a chat model's text apart as it comes: special tokens, reasoning, calls, content."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from .deltas import Delta
from .formats import ReasoningFormat, ToolFormat
from .harmony import Harmony
from .hermes import Hermes
from .llama3 import Llama3
from .machine import Machine, Plain
from .markers import MarkerCutter, Part
from .message import Message
from .mistral import Mistral
from .qwen_xml import QwenXml

_PORTION_CHARS = 1024


class ChatParser(Protocol):
    """Reads one answer. However its text is split, the pieces given add up to the same."""

    def push(self, text: str) -> Delta:
        """What `text`, the new text of the model, adds to the message."""

    def finish(self) -> Delta:
        """What was held back. To be called once, after the last push.

        A call that was not written to its end: once it has been given (its name and the beginning
        of its arguments were there) its arguments end as they stand; otherwise its text is content.
        """


def make_parser(
    format: ToolFormat | None,
    *,
    reasoning: ReasoningFormat | None,
    starts_in_reasoning: bool,
    tools_allowed: bool,
    special_texts: frozenset[str],
    new_id: Callable[[], str],
    text_parameters: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> ChatParser:
    """The parser of one answer.

    `tools_allowed`: without it the markers of calls are content, and no call is ever given.
    `special_texts`: texts of the tokenizer's special tokens, which are dropped where they are not
    markers. `new_id`: called once for each call. `text_parameters`: by function, the parameters
    that are strings by its schema; the format without types (QWEN_XML) goes by it.
    """
    message = Message(new_id)
    machine, markers = _machine(format, message, tools_allowed, text_parameters)
    return _Parser(
        message,
        machine,
        markers,
        reasoning=None if format is ToolFormat.HARMONY else reasoning,
        starts_in_reasoning=starts_in_reasoning,
        special_texts=special_texts,
    )


def _machine(
    form: ToolFormat | None,
    message: Message,
    tools_allowed: bool,
    text_parameters: Mapping[str, frozenset[str]],
) -> tuple[Machine, frozenset[str]]:
    """What reads the answer, and the markers, which are text where no tools are allowed."""
    machine: Machine
    markers = frozenset[str]()
    match form:
        case None:
            machine = Plain(message)
        case ToolFormat.HARMONY:
            return Harmony(message, tools_allowed=tools_allowed), Harmony.markers
        case ToolFormat.HERMES:
            machine, markers = Hermes(message), Hermes.markers
        case ToolFormat.MISTRAL:
            machine, markers = Mistral(message), Mistral.markers
        case ToolFormat.LLAMA3_JSON:
            machine, markers = Llama3(message), Llama3.markers
        case ToolFormat.QWEN_XML:
            machine, markers = QwenXml(message, text_parameters), QwenXml.markers
    return (machine if tools_allowed else Plain(message)), markers


class _Parser:
    """Parts reasoning from the answer; the answer is the format's business.

    Reasoning is opened only before the answer has begun: behind it the markers are a text about
    them. A closing marker there closes nothing, and is dropped.
    """

    def __init__(
        self,
        message: Message,
        machine: Machine,
        markers: frozenset[str],
        *,
        reasoning: ReasoningFormat | None,
        starts_in_reasoning: bool,
        special_texts: frozenset[str],
    ) -> None:
        self._message = message
        self._machine = machine
        self._opening = reasoning.opening if reasoning else None
        self._closing = reasoning.closing if reasoning else None
        self._thinks = reasoning is not None and starts_in_reasoning
        thoughts = frozenset(reasoning.value) if reasoning else frozenset[str]()
        self._dropped = special_texts - markers - thoughts
        self._format_markers = markers
        self._cutter = MarkerCutter(markers | thoughts | special_texts)

    def push(self, text: str) -> Delta:
        # In portions, so that what is copied with each call in a long text stays small.
        for start in range(0, len(text), _PORTION_CHARS):
            for part in self._cutter.push(text[start : start + _PORTION_CHARS]):
                self._take(part)
        return self._message.take()

    def finish(self) -> Delta:
        for part in self._cutter.finish():
            self._take(part)
        self._machine.finish()
        self._message.finish()
        return self._message.take()

    def _take(self, part: Part) -> None:
        marker = part.text if part.is_marker else None
        if marker in self._dropped and not self._machine.in_string:
            return
        if self._thinks:
            self._think(part.text, marker)
        elif marker in self._format_markers:
            self._machine.marker(part.text)
        elif marker in (self._opening, self._closing) and marker and self._may_think():
            self._thinks = marker == self._opening
            self._message.section()
        else:
            self._machine.text(part.text)

    def _think(self, text: str, marker: str | None) -> None:
        if marker is not None and marker == self._closing:
            self._thinks = False
            self._message.section()
        elif marker is None or marker != self._opening:
            self._message.reasoning(text)

    def _may_think(self) -> bool:
        return not self._message.begun and not self._machine.busy
