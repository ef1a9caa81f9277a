"""Completions over a real engine: against stock transformers, and stream against whole."""

import asyncio
import json
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

import tiny
from fake_engine import eventually

URL = "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def stock(tiny_folder) -> Any:
    return tiny.oracle(tiny_folder)


async def ask(client, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json=fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def streamed(client, **fields: Any) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Chunks, and by choice what they add up to."""
    response = await client.post(URL, json={**fields, "stream": True})
    assert response.status_code == 200, response.text
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            add(choices.setdefault(choice["index"], {"text": "", "logprobs": None}), choice)
    return chunks, choices


def add(total: dict[str, Any], choice: dict[str, Any]) -> None:
    assert choice["text"] or choice["finish_reason"] or choice["logprobs"]
    total["text"] += choice["text"]
    total["finish_reason"] = choice["finish_reason"]
    if choice["logprobs"]:
        held = total["logprobs"] or {name: [] for name in choice["logprobs"]}
        total["logprobs"] = {name: held[name] + choice["logprobs"][name] for name in held}


async def test_choices_are_dense_and_usage_is_summed(tiny_client):
    prompts = ["ab", [99, 100, 101], "fghi"]
    body = await ask(tiny_client, prompt=prompts, n=2, seed=1, max_tokens=5, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 30, "total_tokens": 39}
    for number, prompt in enumerate(prompts):
        alone = await ask(tiny_client, prompt=prompt, n=2, seed=1, max_tokens=5, ignore_eos=True)
        for index, choice in enumerate(alone["choices"]):
            assert choice["text"] == body["choices"][2 * number + index]["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"logprobs": 3},
        {"echo": True, "logprobs": 1},
        {"n": 3, "echo": True, "logprobs": 0, "temperature": 1, "seed": 4},
        {"prompt": ["ab", "é and ü", [200, 201]], "n": 2, "logprobs": 2, "temperature": 1.5},
        {"stop": ["a", "\u0105"], "logprobs": 1, "max_tokens": 60, "temperature": 2},
    ],
)
async def test_stream_is_whole(tiny_client, fields):
    fields = {"prompt": "Gravity é is", **GREEDY, "seed": 3, **fields}
    whole = await ask(tiny_client, **fields)
    _, choices = await streamed(tiny_client, **fields)
    assert [
        choices[choice["index"]] | {"index": choice["index"]} for choice in whole["choices"]
    ] == (whole["choices"])


async def test_usage_in_streams(tiny_client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks, _ = await streamed(tiny_client, prompt="ab", **GREEDY, stream_options=options)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and all(
        chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks
    )
    chunks, _ = await streamed(tiny_client, prompt="ab", **GREEDY)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
async def test_echo_and_logprobs_are_stock_s(tiny_client, stock, max_tokens):
    """Entries = prompt + completion, first null, offsets rise, the tokens are the text."""
    prompts = [list(b"Gravity is what pulls"), list(b"a\xc3\xa9b")]
    fields: dict[str, Any] = {"echo": True, "logprobs": 2, **GREEDY, "max_tokens": max_tokens}
    body = await ask(tiny_client, prompt=prompts, **fields)
    for ids, choice in zip(prompts, body["choices"], strict=True):
        logs = choice["logprobs"]
        assert {len(column) for column in logs.values()} == {len(ids) + max_tokens}
        assert logs["token_logprobs"][0] is None and logs["top_logprobs"][0] is None
        assert "".join(logs["tokens"]) == choice["text"]
        offsets = [len("".join(logs["tokens"][:place])) for place in range(len(logs["tokens"]))]
        assert logs["text_offset"] == offsets
        with torch.inference_mode():
            wanted = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
        said = wanted[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
        assert logs["token_logprobs"][1 : len(ids)] == pytest.approx(said, abs=1e-4)
        for place in range(1, len(logs["tokens"])):
            best = max(logs["top_logprobs"][place].values())
            assert logs["token_logprobs"][place] in logs["top_logprobs"][place].values()
            greedy = logs["token_logprobs"][place] == best
            if place < len(ids):
                assert greedy == (int(wanted[place - 1].argmax()) == ids[place])
            else:
                assert greedy, "temperature 0"
        assert choice["finish_reason"] == "length"


async def test_text_echoes_as_it_was_sent(tiny_client):
    body = await ask(tiny_client, prompt="é <eos> ü", echo=True, max_tokens=0)
    assert body["choices"][0]["text"] == "é <eos> ü"
    assert body["usage"]["completion_tokens"] == 0


async def test_the_best_of_many_is_the_likeliest(tiny_client):
    fields = {"prompt": "ab", "max_tokens": 4, "seed": 9, "ignore_eos": True, "logprobs": 0}
    everyone = await ask(tiny_client, **fields, n=5)
    means = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"]) for choice in everyone["choices"]
    }
    best = await ask(tiny_client, **fields, n=2, best_of=5)
    wanted = sorted(means, key=lambda text: -means[text])[:2]
    assert [choice["text"] for choice in best["choices"]] == wanted
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 20, "all that were made"


async def test_prompt_logprobs_by_id(tiny_client):
    body = await ask(tiny_client, prompt=[10, 20, 30], max_tokens=1, prompt_logprobs=2)
    first, *others = body["choices"][0]["prompt_logprobs"]
    assert first is None
    for token, told in zip((20, 30), others, strict=True):
        assert str(token) in told and len(told) in (2, 3)
        assert all(one["logprob"] <= 0 and one["decoded_token"] for one in told.values())


async def test_what_is_left_of_the_context(tiny_client):
    for asked in (-1, 32_000, 512):
        body = await ask(tiny_client, prompt="x" * 500, max_tokens=asked, ignore_eos=True)
        assert body["usage"]["completion_tokens"] == 12
        assert body["choices"][0]["finish_reason"] == "length"
    response = await tiny_client.post(URL, json={"prompt": "x" * 512, "max_tokens": 32_000})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "This model's maximum context length is 512 tokens" in error["message"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"top_p": 0, "temperature": 1}, {"temperature": 0}),
        ({"max_tokens": 6.0}, {}),
        ({"stop": ""}, {}),
        ({"stop": [""]}, {}),
        ({"logprobs": False}, {}),
        ({"n_predict": 6, "max_tokens": None}, {}),
        ({"max_new_tokens": 6, "max_tokens": None}, {}),
        ({"repeat_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ],
)
async def test_other_ways_to_say_the_same(tiny_client, one, other):
    fields = {"prompt": "Gravity is", **GREEDY}
    assert (await ask(tiny_client, **fields | one))["choices"] == (
        await ask(tiny_client, **fields | other)
    )["choices"]


async def test_seeds(tiny_client):
    async def text(seed: object) -> str:
        fields = {"prompt": "ab", "max_tokens": 12, "ignore_eos": True, "temperature": 2}
        return (await ask(tiny_client, **fields, seed=seed))["choices"][0]["text"]

    assert await text(5) == await text(5) != await text(5 + 2**32)
    assert await text(-1) != await text(-1)
    assert await text(None) != await text(None)
    assert await text(2**64 - 2) == await text(2**64 - 2)


async def test_a_bias_forces_and_bans(tiny_client):
    fields = {"prompt": "ab", **GREEDY}
    body = await ask(tiny_client, **fields, logit_bias={"65": 100})
    assert body["choices"][0]["text"] == tiny_text([65] * 6)
    free = await ask(tiny_client, **fields, logprobs=0)
    first = free["choices"][0]["logprobs"]["tokens"]
    banned = await ask(tiny_client, **fields, stop_token_ids=[65], logit_bias={"65": 100})
    assert banned["usage"]["completion_tokens"] == 1 and first
    for name, value in (("logit_bias", {"9999": 1}), ("stop_token_ids", [9999])):
        response = await tiny_client.post(URL, json={**fields, name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def tiny_text(ids: list[int]) -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return "".join(alphabet[token] for token in ids)


async def test_one_refused_prompt_takes_all_with_it(tiny_client, tiny_worker):
    response = await tiny_client.post(URL, json={"prompt": [[1, 2], [9999]], "max_tokens": 50})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    await eventually(lambda: tiny_worker.idle)


async def test_a_seed_s_text_is_the_same_in_company(tiny_client):
    async def text(prompt: str, seed: int) -> str:
        fields = {"max_tokens": 20, "ignore_eos": True, "temperature": 1}
        return (await ask(tiny_client, prompt=prompt, seed=seed, **fields))["choices"][0]["text"]

    prompts = [f"prompt {number}" for number in range(6)]
    alone = [await text(prompt, number) for number, prompt in enumerate(prompts)]
    together = await asyncio.gather(*(text(prompt, n) for n, prompt in enumerate(prompts)))
    assert list(together) == alone
