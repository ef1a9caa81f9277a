"""Token events as the chat API says them. Whole answers are the sum of their chunks."""

from dataclasses import dataclass, field
from typing import Any

from moestro.engine import FinishReason, TokenEvent
from moestro.server.api import Entry, Head, TokenLog, openai_chat
from moestro.server.contract import Tokens
from moestro.server.parsing import ChatParser, Delta, ToolCallDelta

from .chat_prompt import Conversation
from .chat_schema import ChatRequest, Json


@dataclass(slots=True)
class _Answer:
    """One choice so far."""

    parser: ChatParser
    log: TokenLog = field(default_factory=TokenLog)
    unsaid: list[Entry] = field(default_factory=list)  # of tokens that gave nothing to say yet
    entries: list[Entry] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    reason: str | None = None
    begun: bool = False


class ChatReply:
    """Choice number = answer."""

    def __init__(
        self, head: Head, body: ChatRequest, conversation: Conversation, tokens: Tokens
    ) -> None:
        self._head = head
        self._logs = body.logprobs
        self._first_call_alone = body.parallel_tool_calls is False
        self._tokens = tokens
        self._answers = [_Answer(conversation.parser()) for _ in range(body.answers)]

    def take(self, prompt: int, event: TokenEvent) -> list[dict[str, Any]]:
        """One choice for each part of the message, and none without news."""
        said = self.add(prompt, event)
        if not said and event.finish_reason is None:
            return []
        return self._choices(event.index, said or [{}])

    def add(self, prompt: int, event: TokenEvent) -> list[Json]:
        """The parts of the message that are new."""
        answer = self._answers[event.index]
        entries = answer.log.push(event)
        answer.unsaid += entries
        answer.entries += entries
        deltas = [answer.parser.push(event.text)] if event.text else []
        if event.finish_reason is not None:
            deltas.append(answer.parser.finish())
        said = [part for delta in deltas for part in self._parts(answer, delta)]
        if event.finish_reason is not None:
            answer.reason = _reason(event.finish_reason, answer)
        return said

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head.fields(), "object": "chat.completion.chunk", "choices": choices}

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(answer),
                "logprobs": self._logprobs(answer.entries),
                "finish_reason": answer.reason,
            }
            for index, answer in enumerate(self._answers)
        ]
        return {**self._head.fields(), "object": "chat.completion", "choices": choices}

    def _parts(self, answer: _Answer, delta: Delta) -> list[Json]:
        """`delta` as pieces of a message, which are added to it."""
        parts: list[Json] = []
        if delta.reasoning:
            answer.reasoning += delta.reasoning
            parts.append({"reasoning_content": delta.reasoning})
        if delta.content:
            answer.content += delta.content
            parts.append({"content": delta.content})
        calls = [call for call in delta.tool_calls if call.index == 0 or not self._first_call_alone]
        if calls:
            parts.append({"tool_calls": [_called(answer, call) for call in calls]})
        return parts

    def _choices(self, index: int, parts: list[Json]) -> list[dict[str, Any]]:
        answer = self._answers[index]
        entries, answer.unsaid = answer.unsaid, []
        choices: list[dict[str, Any]] = []
        for part in parts:
            role = {} if answer.begun else {"role": "assistant"}
            answer.begun = True
            choices.append(
                {"index": index, "delta": role | part, "logprobs": None, "finish_reason": None}
            )
        choices[0]["logprobs"] = self._logprobs(entries)
        choices[-1]["finish_reason"] = answer.reason
        return choices

    def _logprobs(self, entries: list[Entry]) -> dict[str, Any] | None:
        if not self._logs:
            return None
        tokens = self._tokens
        said = openai_chat(entries, tokens.token_bytes, tokens.token_text)
        return {"content": said, "refusal": None}


def _reason(reason: FinishReason, answer: _Answer) -> str:
    if reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if answer.calls else "stop"


def _called(answer: _Answer, call: ToolCallDelta) -> Json:
    """A piece of a call; its first names it."""
    if call.index == len(answer.calls):
        function = {"name": call.name, "arguments": call.arguments}
        answer.calls.append({"id": call.id, "type": "function", "function": function})
        return {"index": call.index, **answer.calls[-1], "function": dict(function)}
    answer.calls[call.index]["function"]["arguments"] += call.arguments
    return {"index": call.index, "function": {"arguments": call.arguments}}


def _message(answer: _Answer) -> Json:
    message: Json = {
        "role": "assistant",
        "content": answer.content if answer.content or not answer.calls else None,
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = answer.calls
    return message
