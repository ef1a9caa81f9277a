"""A stream adds up to exactly the whole answer: real tokenizers and engine, any tokens."""

import asyncio
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moestro.engine import Tokenizer
from moestro.server.facts.settings import Settings
from moestro.server.serving.app import create_app
from scripted_engine import VOCAB, ScriptedWorker
from tiny_tokenizers import CALL, EOS, opened

PARTS = ["😀", "é", "a b", "  ", "\ufffd", CALL, "ab" + CALL + "a", EOS]
IDS = st.lists(
    st.one_of(st.integers(0, VOCAB - 1), st.integers(0, 255), st.sampled_from(PARTS)),
    min_size=1,
    max_size=16,
)
STOPS = st.lists(
    st.one_of(
        st.text("ab é\ufffd", min_size=1, max_size=4),
        st.sampled_from([EOS, f"b{EOS}a", EOS[:-2], CALL, "😀", "aba", "bab", "|", ">"]),
    ),
    max_size=3,
)
KINDS = st.sampled_from(["byte_level", "sentencepiece", "spaces_kept", "wordpiece"])
SAMPLING = {
    "stop": STOPS,
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "ignore_eos": st.booleans(),
}
COMPLETION = st.fixed_dictionaries(
    {**SAMPLING, "echo": st.booleans(), "logprobs": st.sampled_from([None, 0, 2])}
)
CHAT = st.fixed_dictionaries({**SAMPLING, "logprobs": st.booleans()})
LOG_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(frozen=True)
class Said:
    """What one request was answered, whole and in pieces."""

    whole: dict[str, Any]
    chunks: list[dict[str, Any]]


def ids_of(tokenizer: Tokenizer, asked: list[int | str]) -> list[int]:
    found: list[int] = []
    for one in asked:
        found += [one] if isinstance(one, int) else tokenizer.encode(one, add_special_tokens=False)
    return found or [0]


@cache
def chatting(kind: str) -> Tokenizer:
    """One of its own: others need it without a template."""
    tokenizer: Tokenizer = opened.__wrapped__(kind)
    tokenizer.chat._tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


WORKER = ScriptedWorker()


@cache
def app() -> FastAPI:
    """One for all examples: to make it costs more than an example."""
    return create_app(WORKER, Settings(model="demo"))


def asked_both_ways(path: str, **fields: Any) -> Said:
    async def ask() -> Said:
        transport = httpx.ASGITransport(app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            whole = await client.post(path, json=fields)
            assert whole.status_code == 200, whole.text
            options = {"include_usage": True}
            stream = await client.post(
                path, json={**fields, "stream": True, "stream_options": options}
            )
            return Said(whole.json(), events(stream.text))

    return asyncio.run(ask())


def events(text: str) -> list[dict[str, Any]]:
    *lines, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def choices_of(said: Said) -> dict[int, list[dict[str, Any]]]:
    """Of the chunks, by index; the last chunk has the usage and no choice."""
    *chunks, usage = said.chunks
    assert (usage["choices"], usage["usage"]) == ([], said.whole["usage"])
    found: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        found.setdefault(choice["index"], []).append(choice)
    for choices in found.values():
        reasons = [choice["finish_reason"] for choice in choices]
        assert reasons[-1] and not any(reasons[:-1]), "one finish reason, with the last chunk"
    return found


def completion_of(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What the chunks of one choice add up to."""
    logs = [choice["logprobs"] for choice in choices if choice["logprobs"] is not None]
    added = {name: [one for log in logs for one in log[name]] for name in LOG_LISTS}
    for choice in choices:
        logged = choice["logprobs"] and choice["logprobs"]["tokens"]
        assert choice["text"] or logged or choice["finish_reason"], "an empty chunk"
    return {
        "index": choices[0]["index"],
        "text": "".join(choice["text"] for choice in choices),
        "logprobs": added if logs else None,
        "finish_reason": choices[-1]["finish_reason"],
    }


@given(
    kind=KINDS, prompt=IDS, as_text=st.booleans(), answers=st.tuples(IDS, IDS), fields=COMPLETION
)
@example(  # the text of half a token is out before the token's own entry is
    kind="byte_level",
    prompt=["a b"],
    as_text=True,
    answers=(["ab", "a b", "a b"], ["ab", "ab", "ab"]),
    fields={"stop": ["ba"], "logprobs": 0, "echo": True},
)
@settings(max_examples=60, deadline=None)
def test_completions(
    kind: str,
    prompt: list[int | str],
    as_text: bool,
    answers: tuple[list[int | str], list[int | str]],
    fields: dict[str, Any],
) -> None:
    tokenizer = opened(kind)
    scripts = [ids_of(tokenizer, answer) for answer in answers]
    prompt_ids = ids_of(tokenizer, prompt)
    fields = {
        **fields,
        "prompt": (tokenizer.decode(prompt_ids) or "a") if as_text else prompt_ids,
        "n": 2,
        "max_tokens": min(map(len, scripts)),
        "temperature": 0,
    }
    WORKER.says(tokenizer, scripts)
    said = asked_both_ways("/v1/completions", **fields)
    streamed = choices_of(said)
    tokens = 0
    for whole in said.whole["choices"]:
        assert completion_of(streamed[whole["index"]]) == whole
        if fields["logprobs"] is not None:
            check_log(whole["text"], whole["logprobs"])
            tokens += len(whole["logprobs"]["tokens"])
    if fields["logprobs"] is not None:
        usage = said.whole["usage"]
        echoed = 2 * usage["prompt_tokens"] if fields["echo"] else 0
        assert tokens == usage["completion_tokens"] + echoed


def check_log(text: str, log: dict[str, Any]) -> None:
    assert "".join(log["tokens"]) == text
    ends = [0]
    for token in log["tokens"]:
        ends.append(ends[-1] + len(token))
    assert log["text_offset"] == ends[:-1]
    assert len({len(log[name]) for name in LOG_LISTS}) == 1


@given(
    kind=KINDS,
    answers=st.tuples(IDS, IDS),
    fields=CHAT,
)
@settings(max_examples=40, deadline=None)
def test_chat(
    kind: str, answers: tuple[list[int | str], list[int | str]], fields: dict[str, Any]
) -> None:
    tokenizer = chatting(kind)
    scripts = [ids_of(tokenizer, answer) for answer in answers]
    WORKER.says(tokenizer, scripts)
    said = asked_both_ways(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "ab"}],
        n=2,
        max_tokens=min(map(len, scripts)),
        temperature=0,
        **fields,
    )
    streamed = choices_of(said)
    entries = 0
    for whole in said.whole["choices"]:
        choices = streamed[whole["index"]]
        deltas = [choice["delta"] for choice in choices]
        assert [("role" in delta) for delta in deltas] == [True, *[False] * (len(deltas) - 1)]
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == whole["message"]["content"]
        assert all(delta.get("content") for delta in deltas[:-1]), "an empty chunk"
        assert choices[-1]["finish_reason"] == whole["finish_reason"]
        logs = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
        logged = [entry for log in logs for entry in log]
        assert logged == (whole["logprobs"]["content"] if fields["logprobs"] else [])
        entries += len(logged)
    if fields["logprobs"]:
        assert entries == said.whole["usage"]["completion_tokens"]
