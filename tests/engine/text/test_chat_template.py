"""The model's template writes the prompt; a request only brings data to it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tiny
from moestro.engine import BadParameter, Tokenizer
from moestro.engine.facts import RequestError, TemplateRefused
from moestro.engine.text import TemplateFacts
from moestro.engine.text.chat_template import MOST_MESSAGES, MOST_WORDS_CHARS

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if think is defined and not think %}<think></think>{% endif %}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% if tools %}<|tools|>{{ tools | tojson }}<|eot|>{% endif %}"
    "{% for message in messages %}<|head|>{{ message['role'] }}<|/head|>\n\n"
    "{{ message['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
)
PARTS = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
ONLY_PARTS = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% endif %}{% endfor %}{% endfor %}"
)
AS_JSON = "{% for message in messages %}{{ message.content | tojson }}{% endfor %}"

Opened = Callable[[str | dict[str, str] | None], Tokenizer]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Opens a tokenizer with the template that is given."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_tokenizer(folder)
    known: dict[str, Tokenizer] = {}

    def open_with(template: str | dict[str, str] | None) -> Tokenizer:
        if str(template) not in known:
            tokenizer = known[str(template)] = Tokenizer(folder)
            tokenizer.chat._tokenizer.chat_template = template
        return known[str(template)]

    return open_with


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {}}}


def rendered(tokenizer: Tokenizer, messages: list[dict[str, Any]], **changes: Any) -> str:
    given: dict[str, Any] = {
        "tools": None,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "kwargs": {},
    }
    return tokenizer.render_chat(messages, **(given | changes))


def test_a_conversation_in_the_models_own_words(opened: Opened) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "Yes?"}, user(" Count ")]
    assert rendered(opened(CHATML), messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(opened(CHATML), messages, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_the_templates_variables_come_from_the_request(opened: Opened) -> None:
    told = rendered(opened(CHATML), [user("Hi")], kwargs={"think": False})
    assert told.endswith("<think></think>")


def test_a_final_message_is_continued(opened: Opened) -> None:
    messages = [user("Hi"), {"role": "assistant", "content": "The answer is"}]
    given: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered(opened(CHATML), messages, **given).endswith("assistant\nThe answer is")
    with pytest.raises(TemplateRefused, match="not compatible"):
        rendered(opened(CHATML), messages, continue_final_message=True)


def test_a_template_writes_bos_and_the_prompt_has_it_once(opened: Opened) -> None:
    tokenizer = opened(WITH_BOS)
    text = rendered(tokenizer, [user("Hi")], tools=[tool("look")])
    assert text.startswith('<bos><|tools|>[{"type": "function", "function": {"name": "look"')
    assert tokenizer.encode(text).count(257) == 1


def test_a_template_refuses_in_its_own_words(opened: Opened) -> None:
    with pytest.raises(TemplateRefused, match="Roles must alternate user/assistant") as caught:
        rendered(opened(ALTERNATING), [user("a"), user("b")])
    assert isinstance(caught.value, RequestError) and caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages[0].nothing.more }}", "has no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_whatever_a_template_does_is_the_requests_refusal(
    opened: Opened, template: str, words: str
) -> None:
    with pytest.raises(TemplateRefused, match=words) as caught:
        rendered(opened(template), [user("Hi")])
    assert "\n" not in str(caught.value)


def test_without_a_template_the_next_step_is_named(opened: Opened) -> None:
    tokenizer = opened(None)
    for ask in (lambda: rendered(tokenizer, [user("Hi")]), lambda: tokenizer.chat.facts):
        with pytest.raises(TemplateRefused, match="no chat template; use /v1/completions"):
            ask()
    assert tokenizer.chat.template_text == ""


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "tools", "messages", "conversations", "self", "_x", "a b"]
)
def test_no_request_brings_a_template_or_steers_the_renderer(opened: Opened, name: str) -> None:
    with pytest.raises(TemplateRefused, match=f"'{name}' is no variable") as caught:
        rendered(opened(CHATML), [user("Hi")], kwargs={name: "{{ 7 * 7 }}"})
    assert caught.value.param == "chat_template_kwargs"


def test_text_that_looks_like_a_template_stays_text(opened: Opened) -> None:
    assert "{{ 7 * 7 }}" in rendered(opened(CHATML), [user("{{ 7 * 7 }}")])


def test_hostile_data_is_refused_in_short(opened: Opened) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateRefused, match="recursion"):
        rendered(opened(CHATML), [user(deep)])
    with pytest.raises(TemplateRefused, match="more than"):
        rendered(opened(CHATML), [user("")] * (MOST_MESSAGES + 1))
    with pytest.raises(TemplateRefused, match="empty conversation"):
        rendered(opened(CHATML), [])
    with pytest.raises(TemplateRefused) as caught:
        rendered(opened("{{ raise_exception(messages[0].content) }}"), [user("long " * 10_000)])
    assert len(str(caught.value)) < 2 * MOST_WORDS_CHARS
    with pytest.raises(BadParameter, match="not valid Unicode"):
        opened(CHATML).encode(rendered(opened(CHATML), [user("\ud800")]))


@pytest.mark.parametrize(
    ("template", "facts"),
    [
        (CHATML, TemplateFacts(takes_strings=True, takes_parts=False, renders_tools=False)),
        (WITH_BOS, TemplateFacts(takes_strings=True, takes_parts=False, renders_tools=True)),
        (ALTERNATING, TemplateFacts(takes_strings=True, takes_parts=False, renders_tools=False)),
        (PARTS, TemplateFacts(takes_strings=True, takes_parts=True, renders_tools=False)),
        (ONLY_PARTS, TemplateFacts(takes_strings=False, takes_parts=True, renders_tools=True)),
        (AS_JSON, TemplateFacts(takes_strings=True, takes_parts=False, renders_tools=False)),
    ],
)
def test_what_a_template_takes_is_found_by_rendering(
    opened: Opened, template: str, facts: TemplateFacts
) -> None:
    chat = opened(template).chat
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: chat.facts, range(4))) == {facts}
    assert chat.facts is chat.facts, "rendered for once"


def test_of_several_templates_tools_have_their_own(opened: Opened) -> None:
    tokenizer = opened({"default": CHATML, "tool_use": WITH_BOS})
    assert rendered(tokenizer, [user("Hi")]).startswith("<|im_start|>")
    assert rendered(tokenizer, [user("Hi")], tools=[tool("look")]).startswith("<bos>")
    assert rendered(tokenizer, [user("Hi")], tools=[]).startswith("<|im_start|>")
    assert tokenizer.chat.facts.renders_tools
    assert "<|im_end|>" in tokenizer.chat.template_text
    assert "<|eot|>" in tokenizer.chat.template_text


def test_a_template_file_beside_the_tokenizer_is_read(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.info.chat_template == CHATML == tokenizer.chat.template_text
    names = (tokenizer.info.bos_token, tokenizer.info.eos_token, tokenizer.info.pad_token)
    assert names == ("<bos>", "<eos>", "<pad>")
