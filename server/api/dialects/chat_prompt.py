"""A conversation as the model's own template writes it, and what will read the answer."""

import uuid
from dataclasses import dataclass
from typing import Any

from moestro.engine import BadParameter
from moestro.server.contract import Tokens
from moestro.server.parsing import (
    ChatParser,
    ReasoningFormat,
    ToolFormat,
    make_parser,
    reasoning_format_of,
    starts_in_reasoning,
    tool_format_of,
)

from .chat_schema import ChatRequest, Json

LIST_OF_CALLS = "[TOOL_CALLS]"  # as Mistral's models begin a JSON list of calls


@dataclass(frozen=True, slots=True)
class Conversation:
    """One request's prompt, and how its answers are read."""

    ids: list[int]
    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    in_reasoning: bool  # the prompt ends inside of it
    tools_allowed: bool
    special_texts: frozenset[str]
    text_parameters: dict[str, frozenset[str]]
    held: bool  # to a grammar: no markers come, and no reasoning
    calls_alone: bool  # what it is held to is a list of calls

    @property
    def reads_markers(self) -> bool:
        """The engine must leave special tokens in the text: some say what it is."""
        return not self.held and (self.tools is not None or self.reasoning is not None)

    def parser(self) -> ChatParser:
        """For one answer."""
        form = None if self.held else self.tools
        parser = make_parser(
            ToolFormat.MISTRAL if self.calls_alone else form,
            reasoning=None if self.held else self.reasoning,
            starts_in_reasoning=self.in_reasoning and not self.held,
            tools_allowed=self.tools_allowed,
            special_texts=self.special_texts,
            new_id=lambda: f"call_{uuid.uuid4().hex[:24]}",
            text_parameters=self.text_parameters,
        )
        if self.calls_alone:
            parser.push(LIST_OF_CALLS)
        return parser


def converse(body: ChatRequest, tokens: Tokens, most_tokens: int) -> Conversation:
    """Takes as long as the template; call it in a thread.

    Raises TemplateRefused, BadParameter, PromptTooLong.
    """
    template, tools = tokens.template_text, body.tools_for_model
    form = tool_format_of(template)
    if tools and not tokens.template_facts.renders_tools:
        raise BadParameter("the model's chat template knows no tools: leave them out", "tools")
    if tools and form is None and not body.must_call:
        raise BadParameter(
            "this model writes tool calls in a way that is not known here: leave tools out", "tools"
        )
    text = render(body, tokens)
    ids = tokens.encode(text, most_tokens, add_special_tokens=False)
    reasoning = reasoning_format_of(template)
    return Conversation(
        ids,
        form if tools or form is ToolFormat.HARMONY else None,
        reasoning,
        in_reasoning=starts_in_reasoning(text, reasoning),
        tools_allowed=bool(tools),
        special_texts=frozenset() if body.skip_special_tokens is False else tokens.special_texts,
        text_parameters={tool["function"]["name"]: _text_parameters(tool) for tool in tools},
        held=body.must_call or body.structure is not None,
        calls_alone=body.must_call,
    )


def render(body: ChatRequest, tokens: Tokens) -> str:
    """The prompt's text. Raises TemplateRefused."""
    return tokens.render_chat(
        _messages(body, tokens),
        tools=body.tools_for_model or None,
        add_generation_prompt=_adds_prompt(body),
        continue_final_message=bool(body.continue_final_message),
        kwargs=_variables(body),
    )


def _messages(body: ChatRequest, tokens: Tokens) -> list[Json]:
    facts = tokens.template_facts
    knows_developer = "developer" in tokens.template_text
    messages = []
    for given in body.messages:
        message = dict(given)
        if message["role"] == "developer" and not knows_developer:
            message["role"] = "system"  # what OpenAI called it before
        content = message["content"]
        if isinstance(content, list) and not facts.takes_parts:
            message["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and not facts.takes_strings:
            message["content"] = [{"type": "text", "text": content}]
        messages.append(message)
    return messages


def _adds_prompt(body: ChatRequest) -> bool:
    if body.add_generation_prompt is not None:
        return body.add_generation_prompt
    return not body.continue_final_message


def _variables(body: ChatRequest) -> dict[str, Any]:
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return {**effort, **body.chat_template_kwargs}


def _text_parameters(tool: Json) -> frozenset[str]:
    properties = (tool["function"].get("parameters") or {}).get("properties")
    if not isinstance(properties, dict):
        return frozenset()
    return frozenset(
        name
        for name, schema in properties.items()
        if isinstance(schema, dict) and schema.get("type") == "string"
    )
