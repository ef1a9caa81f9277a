"""Chat templates of each tool format, rendered as transformers renders them.

What a template adds for an assistant's message is what a model of that format would write: so each
template is also its format's writer.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moestro.server.parsing import ChatParser, Delta, ReasoningFormat, ToolFormat, make_parser

TEMPLATES = Path(__file__).parent / "chat_templates"
CHATML = frozenset({"<|im_start|>", "<|im_end|>", "<|endoftext|>"})
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")
LLAMA3 = ("<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>")
HARMONY = ("start", "channel", "constrain", "message", "end", "call", "return", "endoftext")


@dataclass(frozen=True)
class ChatFormat:
    """A template, and what a tokenizer and a parser of its model would know."""

    template: str  # its file's name, without the ending
    tools: ToolFormat
    reasoning: ReasoningFormat | None
    special_texts: frozenset[str]


FORMATS = (
    ChatFormat("hermes", ToolFormat.HERMES, ReasoningFormat.THINK, CHATML),
    ChatFormat("mistral", ToolFormat.MISTRAL, None, frozenset(MISTRAL)),
    ChatFormat("mistral_args", ToolFormat.MISTRAL, ReasoningFormat.BRACKETS, frozenset(MISTRAL)),
    ChatFormat("llama3", ToolFormat.LLAMA3_JSON, None, frozenset(LLAMA3)),
    ChatFormat("harmony", ToolFormat.HARMONY, None, frozenset(f"<|{x}|>" for x in HARMONY)),
    ChatFormat("qwen_xml", ToolFormat.QWEN_XML, None, CHATML),
)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON text


@dataclass
class Answer:
    """What deltas add up to."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


def template_text(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text("utf-8")


def render(name: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    return _template(name).render(messages=messages, **variables)


def written(name: str, message: Mapping[str, Any]) -> str:
    """What a model of this format writes for an assistant's message, its last token included."""
    before = [{"role": "user", "content": "Question"}]
    prompt = render(name, before, add_generation_prompt=True)
    whole = render(name, [*before, message])
    assert whole.startswith(prompt)
    return whole.removeprefix(prompt).removesuffix("\n")


def message_of(answer: Answer) -> dict[str, Any]:
    """The assistant's message as a template takes it: arguments are objects."""
    calls = [
        {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in answer.calls
    ]
    return {
        "role": "assistant",
        "content": answer.content,
        "reasoning_content": answer.reasoning,
        "tool_calls": calls,
    }


def answer_of(deltas: Iterable[Delta]) -> Answer:
    """Adds deltas up as a client does, and checks that the pieces of the calls fit together."""
    answer, seen = Answer(), set[str]()
    for delta in deltas:
        answer.content += delta.content
        answer.reasoning += delta.reasoning
        for piece in delta.tool_calls:
            if piece.id is not None:
                assert piece.name and piece.id not in seen and piece.index == len(answer.calls)
                seen.add(piece.id)
                answer.calls += (Call(piece.name, piece.arguments),)
            else:
                assert piece.name is None and piece.index == len(answer.calls) - 1
                last = answer.calls[-1]
                answer.calls = (
                    *answer.calls[:-1],
                    Call(last.name, last.arguments + piece.arguments),
                )
    return answer


def parser_of(form: ChatFormat | None, **changes: Any) -> ChatParser:
    numbers = itertools.count()
    options: dict[str, Any] = {
        "reasoning": form and form.reasoning,
        "starts_in_reasoning": False,
        "tools_allowed": True,
        "special_texts": form.special_texts if form else frozenset({"<|im_end|>"}),
        "new_id": lambda: f"call_{next(numbers)}",
    }
    return make_parser(form.tools if form else None, **options | changes)


def parsed(form: ChatFormat | None, pieces: list[str], **changes: Any) -> Answer:
    parser = parser_of(form, **changes)
    return answer_of([*(parser.push(piece) for piece in pieces), parser.finish()])


@cache
def _template(name: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    globals_: dict[str, Callable[..., Any]]
    globals_ = {
        "raise_exception": _raise,
        "strftime_now": datetime(2025, 1, 2, tzinfo=UTC).strftime,
    }
    environment.globals.update(globals_)
    environment.filters["tojson"] = _tojson
    return environment.from_string(template_text(name))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
