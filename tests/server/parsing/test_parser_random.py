"""Random arguments come back out of what the templates write, and odd text does no harm."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_formats import FORMATS, Answer, Call, ChatFormat, message_of, parsed, written

BY_NAME = {form.template: form for form in FORMATS}
by_name = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.template)

ODD = st.sampled_from(
    [
        "{",
        '"}',
        "\\",
        "</tool_call>",
        "[TOOL_CALLS]",
        "é😀\n\x00",
        "<|im_end|>",
        "<|return|>",
        "<|end|>",
    ]
)
KEYS = st.text() | ODD
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,15}", fullmatch=True)
PROSE = st.text("ab é\n.<[{|", max_size=20).map(str.strip)
# In this format every value is text: one that looks like another type is taken for it.
XML_OBJECTS = st.dictionaries(
    NAMES, st.text().map(lambda text: f"§{text}") | st.lists(JSON), max_size=3
)


@by_name
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_the_template_writes_comes_back(form: ChatFormat, data: st.DataObject) -> None:
    objects = (
        XML_OBJECTS if form.template == "qwen_xml" else st.dictionaries(KEYS, JSON, max_size=3)
    )
    pairs = data.draw(st.lists(st.tuples(NAMES, objects), max_size=3))
    as_calls = tuple(Call(name, json.dumps(value, ensure_ascii=False)) for name, value in pairs)
    content = data.draw(PROSE) or ("" if as_calls else "-")
    if form.template == "llama3" and as_calls:
        content = ""
    reasoning = data.draw(PROSE) if form.reasoning or form.template == "harmony" else ""
    answer = Answer(content, reasoning, as_calls)
    text = written(form.template, message_of(answer))
    got = parsed(form, split(data, text))
    assert got == answer


def split(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


BITS = [
    *(
        "alpha",
        "beta ",
        "\n",
        " ",
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ";",
        "\\",
        "\\u",
        "null",
        "1",
        "<",
        "to=",
    ),
    *(
        '{"name": "f", "arguments": ',
        '{"name": "g", "parameters": {}}',
        '"{\\"a\\": 1}"',
        '{"a": "',
    ),
    *(
        "<think>",
        "</think>",
        "<|im_end|>",
        "</s>",
        "<|eot_id|>",
        "f",
        ">",
        "functions.f",
        "commentary",
    ),
]
MARKERS = {
    "hermes": ["<tool_call>", "</tool_call>"],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "mistral_args": ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"],
    "llama3": ["<|python_tag|>"],
    "harmony": sorted(BY_NAME["harmony"].special_texts)
    + ["<|channel|>commentary to=functions.f<|message|>"],
    "qwen_xml": ["<tool_call>", "<function=", "<parameter=", "</parameter>", "</function>"],
}


@by_name
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_text_is_too_odd(form: ChatFormat, data: st.DataObject) -> None:
    bits = st.sampled_from(BITS) | st.sampled_from(MARKERS[form.template])
    text = "".join(data.draw(st.lists(bits, max_size=25)))
    whole = parsed(form, [text])
    assert parsed(form, split(data, text)) == whole
    if form.template == "harmony":
        assert not re.search(r"<\|(start|channel|message|end|call)\|>", whole.content)
    elif not whole.calls:
        words = sorted(re.findall("alpha|beta", whole.content + whole.reasoning))
        assert words == sorted(re.findall("alpha|beta", text))
