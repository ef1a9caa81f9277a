"""Whatever a model writes, and however it is split, comes apart the same way."""

import itertools
import json
from typing import Any

import pytest

from chat_formats import (
    FORMATS,
    Answer,
    Call,
    ChatFormat,
    answer_of,
    message_of,
    parsed,
    parser_of,
    written,
)
from moestro.server.parsing import Delta, ReasoningFormat, ToolFormat

THINK = ReasoningFormat.THINK
BY_NAME = {form.template: form for form in FORMATS}
by_name = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.template)


def every_split(form: ChatFormat | None, text: str, **changes: Any) -> Answer:
    """The answer, which must be the same whole, by character, and in two at each place."""
    whole = parsed(form, [text], **changes)
    assert parsed(form, list(text), **changes) == whole
    for at in range(len(text)):
        assert parsed(form, [text[:at], text[at:]], **changes) == whole
    return whole


def calls(*pairs: tuple[str, str]) -> tuple[Call, ...]:
    return tuple(itertools.starmap(Call, pairs))


ONE = calls(("f", '{"a": 1}'))
TWO = calls(("f", '{"a": 1}'), ("g", "{}"))
F, G = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {}}'
LF, LG = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {}}'
TO_F = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"

WELL_FORMED = [
    ("hermes", "Hi!<|im_end|>", Answer("Hi!")),
    ("hermes", f"<tool_call>\n{F}\n</tool_call><|im_end|>", Answer(calls=ONE)),
    (
        "hermes",
        f"See.\n<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>\n",
        Answer("See.", "", TWO),
    ),
    ("hermes", f"<tool_call>{F}<tool_call>{G}", Answer(calls=TWO)),
    ("hermes", f"A<tool_call>{F}</tool_call> B", Answer("A\nB", "", ONE)),
    ("hermes", "<think>\nHm <tool_call>\n</think>\n\nNo.", Answer("No.", "Hm <tool_call>")),
    ("hermes", f"<think>Hm</think>\n<tool_call>{F}</tool_call>", Answer("", "Hm", ONE)),
    ("hermes", "\n<think>A</think>\n<think>B</think>C", Answer("C", "A\nB")),
    ("hermes", "</think>\n\nNo.", Answer("No.")),
    ("hermes", "Write <think> and </think>.", Answer("Write <think> and </think>.")),
    ("hermes", "1 < 2 <tool> <|im_", Answer("1 < 2 <tool> <|im_")),
    ("mistral", f"[TOOL_CALLS] [{F}, {G}]</s>", Answer(calls=TWO)),
    ("mistral", f"See. [TOOL_CALLS]{F}[TOOL_CALLS][{G}]", Answer("See.", "", TWO)),
    ("mistral", 'a[0] = [TOOL_CALLS, "x"]', Answer('a[0] = [TOOL_CALLS, "x"]')),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{}</s>', Answer(calls=TWO)),
    (
        "mistral_args",
        '[THINK]Hm[/THINK]See.[TOOL_CALLS]f[CALL_ID]x1[ARGS]{"a": 1}',
        Answer("See.", "Hm", ONE),
    ),
    ("llama3", f"{LF}; {LG}<|eot_id|>", Answer(calls=TWO)),
    ("llama3", f"<|python_tag|>{F};\n{G}<|eom_id|>", Answer(calls=TWO)),
    ("llama3", '\n{"type": "function", "name": "f", "parameters": {"a": 1}}', Answer(calls=ONE)),
    ("llama3", '{"parameters": {"a": 1}, "name": "f"}', Answer(calls=ONE)),
    ("llama3", f"Write {LF}.", Answer(f"Write {LF}.")),
    ("llama3", '{"name": "Bob", "age": 3}', Answer('{"name": "Bob", "age": 3}')),
    (
        "llama3",
        '{"name": "f", "x": 1, "parameters": {}}',
        Answer('{"name": "f", "x": 1, "parameters": {}}'),
    ),
    ("llama3", '{"name": "f"}', Answer('{"name": "f"}')),
    ("llama3", "{1" + LF, Answer("{1" + LF)),
    ("llama3", "<|python_tag|>print({})", Answer("print({})")),
    ("llama3", "; no", Answer("; no")),
    ("harmony", "<|channel|>final<|message|>Hi!<|return|>", Answer("Hi!")),
    (
        "harmony",
        f"<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{TO_F}" + '{"a": 1}<|call|>',
        Answer("", "Hm", ONE),
    ),
    (
        "harmony",
        ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|start|>assistant<|channel|>commentary to=functions.g<|message|><|call|>",
        Answer(calls=TWO),
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>See.<|end|><|start|>assistant" + TO_F + '{"a": 1}',
        Answer("See.", "", ONE),
    ),
    ("harmony", "<|channel|>analysis to=python<|message|>1+1<|call|>", Answer("", "1+1")),
    ("harmony", "plain <|end|>", Answer("plain ")),
    ("harmony", "<|channel|>final", Answer()),
    ("harmony", "<|channel|>a b c d e f<|message|>", Answer("a b c d e f")),
    (
        "qwen_xml",
        "See.\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
        "<function=g></function></tool_call>",
        Answer("See.", "", TWO),
    ),
    (
        "qwen_xml",
        '<function=f><parameter=a>\n<tool_call>"\n\n</parameter>\n'
        '<parameter=b>{"c": [2]}</parameter><parameter=d>1 2</parameter></function>',
        Answer(calls=calls(("f", '{"a": "<tool_call>\\"\\n", "b": {"c": [2]}, "d": "1 2"}'))),
    ),
]


@pytest.mark.parametrize(("name", "text", "answer"), WELL_FORMED)
def test_what_models_write(name: str, text: str, answer: Answer) -> None:
    assert every_split(BY_NAME[name], text) == answer


def hermes(call: str) -> str:
    return f"<tool_call>{call}</tool_call>"


FORGIVEN = [
    ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
    ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
    ('{"id": [{"x": 1}], "name": "f", "n": 12 , "arguments": {}}', "{}"),
    ('{"name": "f"}', "{}"),
    ('{"name": "f", "arguments": null}', "{}"),
    ('{"name": "f", "arguments": ""}', "{}"),
    (
        r'{"name": "f", "arguments": " {\"a\": \"\\\"\\u00e9\ud83d\ude00\"} "}',
        r'{"a": "\"\u00e9\ud83d\ude00"}',
    ),
    ('{"name": "f", "arguments": {"a": "1\n2"}}', r'{"a": "1\u000a2"}'),
    ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),
    (
        '{"name": "f", "arguments": {"a": "</tool_call><|im_end|>"}}',
        '{"a": "</tool_call><|im_end|>"}',
    ),
    ('{"name": "f", "arguments": {}, "arguments": {"a": 1}, "name": "g"}', "{}"),
]


@pytest.mark.parametrize(("call", "arguments"), FORGIVEN)
def test_what_is_forgiven(call: str, arguments: str) -> None:
    answer = every_split(BY_NAME["hermes"], hermes(call))
    assert answer == Answer(calls=calls(("f", arguments)))
    json.loads(answer.calls[0].arguments)


def test_markers_in_a_string_of_a_harmony_call_are_text() -> None:
    markers = "<|return|><|end|><|start|>assistant<|channel|>final<|message|><|endoftext|><|call|>"
    one = calls(("f", f'{{"{markers}": "{markers}"}}'))
    text = f"{TO_F}{one[0].arguments}<|call|><|start|>assistant<|channel|>final<|message|>Hi"
    assert every_split(BY_NAME["harmony"], text) == Answer("Hi", "", one)


NO_CALLS = [
    "oops",
    '["f"]',
    '{"name": f}',
    '{"name": 5, "arguments": {}}',
    '{"name": "", "arguments": {}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": 1}',
    '{"name": "f", "arguments": "x"}',
    '{"arguments": {"a": 1}}',
    "{'name': 'f'}",
    '{"name": "f',
    '{"name": "f", }',
    '{"arguments": {"a": 01}, "name": "f"}',
    '{"arguments": {"a": "\\x"}, "name": "f"}',
    '{"arguments": ' + '{"a":' * 300 + "1" + "}" * 300 + ', "name": "f"}',
]


@pytest.mark.parametrize("call", NO_CALLS)
def test_a_call_that_is_none_is_given_back(call: str) -> None:
    text = hermes(call)
    assert (
        parsed(BY_NAME["hermes"], [text]) == parsed(BY_NAME["hermes"], list(text)) == Answer(call)
    )


def test_a_name_no_text_can_be() -> None:
    call = r'{"name": "\ud800", "arguments": {}}'
    assert every_split(BY_NAME["hermes"], hermes(call)) == Answer(call)


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        (
            "hermes",
            hermes('{"name": "f", "arguments": {"a": !}}'),
            Answer("!}}", "", calls(("f", '{"a": '))),
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "x',
            Answer(calls=calls(("f", '{"a": "x'))),
        ),
        ("hermes", '<tool_call>{"name": "f", "argum', Answer('{"name": "f", "argum')),
        (
            "hermes",
            hermes(r'{"name": "f", "arguments": "{\"a\": !}"}'),
            Answer('!}"}', "", calls(("f", '{"a": '))),
        ),
        ("mistral", "[TOOL_CALLS]two words[ARGS]{}", Answer("two words{}")),
        ("mistral", "[TOOL_CALLS]f[ARGS]oops", Answer("foops")),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]12", Answer("f12")),
        ("mistral", f"[TOOL_CALLS][{F}, oops]", Answer("oops]", "", ONE)),
        ("mistral", "[TOOL_CALLS][]", Answer()),
        ("mistral", "[TOOL_CALLS] [1, 2]", Answer("[1, 2]")),
        ("mistral", "[ARGS] x", Answer(" x")),
        ("llama3", '{"name": "f", "param', Answer('{"name": "f", "param')),
        ("llama3", f"{LF} and {LG}", Answer(f"and {LG}", "", ONE)),
        ("harmony", f"{TO_F}oops<|call|>", Answer("oops")),
        ("harmony", f"{TO_F}" + '{"a": <|end|>', Answer(calls=calls(("f", '{"a": ')))),
        ("harmony", f"{TO_F}" + '{"a": "<|end|>', Answer(calls=calls(("f", '{"a": "<|end|>')))),
        ("qwen_xml", "<function=f><parameter=a>\nx", Answer(calls=calls(("f", '{"a": "x')))),
        ("qwen_xml", "<function=a b>x", Answer("a b>x")),
        (
            "qwen_xml",
            "<function=f><parameter=a b>x</function>",
            Answer("a b>x", "", calls(("f", "{}"))),
        ),
    ],
)
def test_calls_that_break_or_end_too_early(name: str, text: str, answer: Answer) -> None:
    assert every_split(BY_NAME[name], text) == answer


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_args", "llama3", "qwen_xml"])
def test_without_tools_markers_are_text(name: str) -> None:
    form = BY_NAME[name]
    text = written(name, message_of(Answer("", "", TWO)))
    end = (
        "<|im_end|>"
        if name in ("hermes", "qwen_xml")
        else "<|eot_id|>"
        if name == "llama3"
        else "</s>"
    )
    answer = every_split(form, text, tools_allowed=False)
    assert answer == Answer(text.removesuffix(end))


def test_without_tools_there_is_still_reasoning() -> None:
    text = "<think>Hm</think>" + hermes(F)
    assert every_split(BY_NAME["hermes"], text, tools_allowed=False) == Answer(hermes(F), "Hm")
    text = f"<|channel|>analysis<|message|>Hm<|end|>{TO_F}" + "{}<|call|>"
    assert every_split(BY_NAME["harmony"], text, tools_allowed=False) == Answer("{}", "Hm")


def test_no_format() -> None:
    text = f"{hermes(F)} <think>{{<|im_end|> \n"
    assert every_split(None, text) == Answer(f"{hermes(F)} <think>{{ \n")
    assert every_split(None, "<think>Hm</think> A", reasoning=THINK) == Answer("A", "Hm")


def test_a_prompt_that_opened_the_thought() -> None:
    options = {"starts_in_reasoning": True}
    assert every_split(BY_NAME["hermes"], "Hm\n</think>\n\nA", **options) == Answer("A", "Hm")
    assert every_split(BY_NAME["hermes"], "<think>\nHm", **options) == Answer("", "Hm")


def test_a_text_that_looks_like_a_number() -> None:
    text = "<function=f><parameter=zip>01</parameter><parameter=n>\n8000\n</parameter></function>"
    options = {"text_parameters": {"f": frozenset({"n"}), "g": frozenset({"zip"})}}
    assert every_split(BY_NAME["qwen_xml"], text, **options).calls == calls(
        ("f", '{"zip": "01", "n": "8000"}')
    )
    assert every_split(BY_NAME["qwen_xml"], text).calls == calls(("f", '{"zip": "01", "n": 8000}'))


def test_a_long_text_in_one_piece() -> None:
    count = 500
    answer = parsed(BY_NAME["llama3"], ["; ".join([LF] * count)])
    assert answer == Answer(calls=ONE * count)


def test_special_tokens_are_dropped_where_they_mean_nothing() -> None:
    text = "<think>H<|im_end|>m</think>A<|endoftext|>B"
    assert every_split(BY_NAME["hermes"], text) == Answer("AB", "Hm")
    assert every_split(None, "abc", special_texts=frozenset({"ab", "bc"})) == Answer("c")
    longer = frozenset({"<|a|>", "<|a|>b", "<|a|>bcd"})
    assert every_split(
        None, "1<|a|>2<|a|>b3<|a|>bc4<|a|>bcd<|a|>bc", special_texts=longer
    ) == Answer("123c4c")


def test_nothing_waits_longer_than_it_must() -> None:
    parser = parser_of(BY_NAME["hermes"])
    assert parser.push("Hello <") == Delta("Hello")
    assert parser.push("tool> ") == Delta(" <tool>")
    assert not parser.push("<tool_ca")
    assert not parser.push('ll>{"name": "f", "arguments":')
    (first,) = parser.push(' {"a"').tool_calls
    assert (first.index, first.id, first.name, first.arguments) == (0, "call_0", "f", '{"a"')
    (second,) = parser.push(': "x').tool_calls
    assert (second.index, second.id, second.name, second.arguments) == (0, None, None, ': "x')
    assert [piece.arguments for piece in parser.push('y"}}').tool_calls] == ['y"}']
    (third,) = parser.push('</tool_call><tool_call>{"name": "g"}').tool_calls
    assert (third.index, third.id, third.name, third.arguments) == (1, "call_1", "g", "{}")
    assert not parser.finish()


@by_name
def test_what_is_held_back_is_bounded(form: ChatFormat) -> None:
    """The most of a text that could always become something; a marker is at most 20 long."""
    parser = parser_of(form)
    head = "x" if form.tools is not ToolFormat.HARMONY else "<|channel|>final<|message|>"
    answer = answer_of([parser.push(head), *(parser.push("<[<|<") for _ in range(500))])
    assert len(answer.content) > 500 * 5 - 25
