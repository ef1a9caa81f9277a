"""Templates are recognised by what they render, and render what chats are made of."""

import json

import pytest
from jinja2 import TemplateError

from chat_formats import FORMATS, ChatFormat, render, template_text
from moestro.server.parsing import (
    ReasoningFormat,
    ToolFormat,
    reasoning_format_of,
    starts_in_reasoning,
    tool_format_of,
)

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "And tomorrow?"},
)
by_name = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.template)


@by_name
def test_the_template_is_recognised(form: ChatFormat) -> None:
    text = template_text(form.template)
    assert tool_format_of(text) is form.tools
    assert reasoning_format_of(text) is form.reasoning


@by_name
def test_the_template_renders_a_chat_with_tools(form: ChatFormat) -> None:
    text = render(form.template, CHAT, tools=[TOOL], add_generation_prompt=True)
    parts = ("Be brief.", "weather", "properties", "How is the weather?", "Let me see.", "Zürich")
    places = [text.index(part) for part in (*parts, "sunny", "It is sunny.", "And tomorrow?")]
    assert places[0] < places[3] < places[4] < places[5] < places[6] < places[7] < places[8]
    assert json.dumps({"city": "Zürich"}, ensure_ascii=False) in text or form.template == "qwen_xml"
    assert "properties" not in render(form.template, CHAT)


def test_a_template_can_refuse() -> None:
    with pytest.raises(TemplateError, match="role clown"):
        render("mistral", [{"role": "clown", "content": ""}])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", None),
        ("<tool_call>name\n<arg_key>city</arg_key>", None),
        ("<｜tool▁calls▁begin｜><tool_call>", None),
        ('Write {"name": its name, "parameters": its arguments}', ToolFormat.LLAMA3_JSON),
        ("{{ '<|python_tag|>' + code }}", ToolFormat.LLAMA3_JSON),
        ('{"name": x, "arguments": {}}', None),
    ],
)
def test_other_templates(text: str, form: ToolFormat | None) -> None:
    assert tool_format_of(text) is form


def test_reasoning_is_found_by_either_marker() -> None:
    assert reasoning_format_of("{{ content.split('</think>')[-1] }}") is ReasoningFormat.THINK
    assert reasoning_format_of("{{ content }}") is None
    assert reasoning_format_of("<|channel|>analysis <think>") is None


def test_a_prompt_that_ends_in_an_open_thought() -> None:
    think = ReasoningFormat.THINK
    assert starts_in_reasoning("<|im_start|>assistant\n<think>\n", think)
    assert starts_in_reasoning("[INST]Hi[/INST][THINK]", ReasoningFormat.BRACKETS)
    assert not starts_in_reasoning("<think>\n", None)
    assert not starts_in_reasoning("what is <think>?<|im_end|>\n<|im_start|>assistant\n", think)
    closed = render("hermes", CHAT, add_generation_prompt=True, enable_thinking=False)
    assert "<think>" in closed
    assert not starts_in_reasoning(closed, think)
