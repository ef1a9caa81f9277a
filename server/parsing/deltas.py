"""What a parser gives: pieces of reasoning, of the answer, and of tool calls."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the tool call number `index`; `id` and `name` come with its first piece only."""

    index: int
    arguments: str = ""  # a piece of JSON text
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What some text of the model adds to the message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)
