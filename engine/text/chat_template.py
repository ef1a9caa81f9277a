"""The model's own chat template: messages to the text of a prompt, and what it can take.

Rendering is transformers': jinja in a sandbox. A request brings data, never a template.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moestro.engine.facts import TemplateRefused

MOST_MESSAGES = 10_000  # templates may look at all of them for each; a body's size is no bound
MOST_WORDS_CHARS = 500  # of an error: transformers puts the whole conversation into some

_PROBE = "what-moestro-asks"
_AS_DATA = re.compile(rf"text['\"]\s*:\s*['\"]{_PROBE}")  # a list only printed, by Python or JSON
_TOOL_NAME = "tool_that_moestro_asks_for"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL_NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
# All that a template can raise over the data: it is a program, in jinja's words or in Python's.
_RAISED = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a rendering shows of a template."""

    takes_strings: bool  # a message's content may be a string
    takes_parts: bool  # or a list of {"type": "text", "text": …}
    renders_tools: bool  # the model is told of them


class ChatTemplate:
    """The template of one tokenizer of transformers. Thread safe."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def template_text(self) -> str:
        """Its source, all of them where there are several; "" for none."""
        found: str | dict[str, str] | None = self._tokenizer.chat_template
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    @cached_property  # two threads may find out the same twice
    def facts(self) -> TemplateFacts:
        """Found by rendering, at the first call. Raises TemplateRefused where there is none."""
        self._check_there_is_one()
        parts = self._probe([{"type": "text", "text": _PROBE}])
        takes_parts = _PROBE in parts and not _AS_DATA.search(parts)
        return TemplateFacts(
            takes_strings=_PROBE in self._probe(_PROBE) or not takes_parts,
            takes_parts=takes_parts,
            renders_tools=self._names_the_tool(_PROBE)
            or (takes_parts and self._names_the_tool([{"type": "text", "text": _PROBE}])),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        """The prompt's text, special tokens written out. `kwargs` are the template's variables.

        Raises TemplateRefused: no template, data that it does not take (in its own words), or a
        name in `kwargs` that is not the request's to set.
        """
        self._check_there_is_one()
        _check_names(kwargs)
        if len(messages) > MOST_MESSAGES:
            raise TemplateRefused(
                f"{len(messages)} messages are more than {MOST_MESSAGES}; leave some out",
                "messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        except _RAISED as error:
            raise TemplateRefused(
                f"the model's chat template does not take this request: {_words(error)}", "messages"
            ) from error
        return str(text)

    def _check_there_is_one(self) -> None:
        if not self._tokenizer.chat_template:
            raise TemplateRefused("the model has no chat template; use /v1/completions", "messages")

    def _names_the_tool(self, content: object) -> bool:
        return _TOOL_NAME in self._probe(content, [_PROBE_TOOL])

    def _probe(self, content: object, tools: list[dict[str, Any]] | None = None) -> str:
        """A rendering of one message, "" where the template refuses it."""
        try:
            return self.render(
                [{"role": "user", "content": content}],
                tools=tools,
                add_generation_prompt=True,
                continue_final_message=False,
                kwargs={},
            )
        except TemplateRefused:
            return ""


def _reserved_names() -> frozenset[str]:
    """What only the server says to the renderer; `documents` are data like the messages."""
    own = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    return frozenset(
        (own | {*inspect.signature(render_jinja_template).parameters} | {"messages"})
        - {"documents"}
    )


def _check_names(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise TemplateRefused(
                f"{name[:MOST_WORDS_CHARS]!r} is no variable of a chat template that a request may"
                " set; leave it out",
                "chat_template_kwargs",
            )


def _words(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= MOST_WORDS_CHARS else f"{words[:MOST_WORDS_CHARS]} …"


_RESERVED = _reserved_names()
