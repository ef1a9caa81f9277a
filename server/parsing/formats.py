"""Which ways of writing tool calls and reasoning there are, and which one a chat template teaches.

A template is only searched for the markers it renders; no model's name is known here.
"""

import re
from enum import Enum


class ToolFormat(Enum):
    """How a model writes a tool call."""

    HERMES = "hermes"  # <tool_call>{"name": "f", "arguments": {}}</tool_call>; Qwen too
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": "f", "arguments": {}}] or [TOOL_CALLS]f[ARGS]{}
    LLAMA3_JSON = "llama3_json"  # {"name": "f", "parameters": {}}, maybe after <|python_tag|>
    HARMONY = "harmony"  # <|channel|>commentary to=functions.f <|constrain|>json<|message|>{}
    QWEN_XML = (
        "qwen_xml"  # <tool_call><function=f><parameter=x>1</parameter></function></tool_call>
    )


class ReasoningFormat(Enum):
    """The two markers around a model's reasoning."""

    THINK = ("<think>", "</think>")
    BRACKETS = ("[THINK]", "[/THINK]")

    @property
    def opening(self) -> str:
        return self.value[0]

    @property
    def closing(self) -> str:
        return self.value[1]


# Formats that share a marker with one of ours and write something else behind it.
_UNKNOWN_FORMATS = re.compile(r"<arg_key>|<｜tool")
_LLAMA3_WORDING = re.compile(r'\{\s*"name":[^{}]{1,100}"parameters":')
_TOOL_MARKERS: tuple[tuple[re.Pattern[str], ToolFormat], ...] = (
    (re.compile(r"<\|channel\|>"), ToolFormat.HARMONY),
    (re.compile(r"\[TOOL_CALLS\]"), ToolFormat.MISTRAL),
    (re.compile(r"<function=[\s\S]*<parameter="), ToolFormat.QWEN_XML),
    (re.compile(r"<tool_call>"), ToolFormat.HERMES),
    (re.compile(r"<\|python_tag\|>"), ToolFormat.LLAMA3_JSON),
    (_LLAMA3_WORDING, ToolFormat.LLAMA3_JSON),
)


def tool_format_of(template_text: str) -> ToolFormat | None:
    """The format a chat template (its Jinja source) renders tool calls in; None: no known one."""
    if _UNKNOWN_FORMATS.search(template_text):
        return None
    return next((form for mark, form in _TOOL_MARKERS if mark.search(template_text)), None)


def reasoning_format_of(template_text: str) -> ReasoningFormat | None:
    """The markers of reasoning in a chat template. None for harmony, whose channels say it."""
    if "<|channel|>" in template_text:
        return None
    for form in ReasoningFormat:
        if form.opening in template_text or form.closing in template_text:
            return form
    return None


def starts_in_reasoning(prompt_text: str, reasoning: ReasoningFormat | None) -> bool:
    """Whether the rendered prompt ends with an open marker: the model's first word is a thought."""
    return reasoning is not None and prompt_text.rstrip().endswith(reasoning.opening)
