"""A burst of bad requests beside healthy streams of a real engine: they harm nobody else's.

Each bad one is a 4xx in our shape; the healthy ones say what they say alone.
"""

import asyncio
import json
from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "ab", "max_tokens": 3},
    CHAT: {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3},
}
HEALTHY = [
    (COMPLETIONS, {"prompt": "Gravity", "max_tokens": 16}),
    (COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 12, "logprobs": 1, "echo": True}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, "n": 2}),
]
LONE = "\ud800"
NAN, INF = float("nan"), float("inf")
DIGITS = "@5000 digits@"  # more than Python reads as a number
NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty"]
PENALTIES = ["presence_penalty", "frequency_penalty"]
COUNTS = ["max_tokens", "min_tokens", "top_k", "seed", "n"]
NO_NUMBERS: list[Any] = [NAN, -INF, 1e308, 10**400, DIGITS, True, "3"]
NO_COUNTS: list[Any] = [1.5, NAN, INF, 1e308, 10**400, DIGITS, True, "3"]
TOO_MANY: list[tuple[str, Any]] = [
    ("n", 129),
    ("n", 64),  # more than run at once here
    ("n", 0),
    ("min_tokens", 4),
    ("stop", ["a"] * 65),
    ("stop", "a" * 1001),
    ("stop", [LONE]),
    ("stop", [1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [DIGITS]),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": 10**400}),
    ("logit_bias", {"999": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {str(one): 1 for one in range(2000)}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}),
    ("guided_regex", "(" * 5000),
    ("guided_json", {"type": "integer", "minimum": 5, "maximum": 3}),
    ("model", "../../etc/passwd\0" * 500),
    ("model", LONE),
    ("user", 3),
    ("experts", {"mode": "sequence", "density": INF}),
    ("experts", {"mode": "sequence", "density": DIGITS}),
    ("experts", {"mode": LONE}),
]
PROMPTS: list[Any] = [
    *(None, "", [], [[]], [""], [1, "a"], ["a", 1], {}, 3, True, [True], [1.5], [-1], [999]),
    *([2**63], [DIGITS], LONE, ["a", LONE], "a" * 600, [1] * 600, [7] * 1_000_000, ["a"] * 129),
]
MESSAGES: list[Any] = [
    *(None, "", [], {}, [None], ["a"], [{}], [[]], [{"role": 3, "content": "a"}]),
    *([{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "user", "content": [3]}]),
    *([{"role": "user", "content": LONE}], [{"role": LONE, "content": "a"}]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999}}]}],
    [{"role": "user", "content": "a" * 600}],
    [{"role": "user", "content": "a"}] * 4097,
]
OF_ONE: dict[str, list[tuple[str, Any]]] = {
    COMPLETIONS: [
        *(("prompt", value) for value in PROMPTS),
        *((name, value) for name in ("best_of", "logprobs") for value in NO_COUNTS[:-2]),
        *(("best_of", 129), ("logprobs", 21), ("logprobs", -1), ("prompt_logprobs", 21)),
    ],
    CHAT: [
        *(("messages", value) for value in MESSAGES),
        *(("top_logprobs", value) for value in (-1, 21, *NO_COUNTS)),
        *(("tools", [3]), ("tool_choice", "required"), ("chat_template_kwargs", {"a b": 1})),
    ],
}
OF_BOTH: list[tuple[str, Any]] = [
    *((name, value) for name in NUMBERS for value in (-1, *NO_NUMBERS)),
    *((name, value) for name in PENALTIES for value in (-3, *NO_NUMBERS)),
    *((name, value) for name in COUNTS for value in (-(2**64), *NO_COUNTS)),
    *TOO_MANY,
]
AT_ONCE = {"stop_token_ids": list(range(256))}  # any token ends the answer
# 1e308 and 10**400 are whole: so many tokens are what is left, and so many to choose from are all
MEANT = {("max_tokens", 1e308), ("max_tokens", 10**400), ("top_k", 1e308), ("top_k", 10**400)}


def bad_ones() -> list[tuple[str, bytes]]:
    made = []
    for path, body in GOOD.items():
        for name, value in [*OF_BOTH, *OF_ONE[path]]:
            if not (isinstance(value, int | float) and (name, value) in MEANT):
                made.append((path, written({**body, name: value})))
        made += [(path, raw) for raw in (b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"null", b"3")]
    return made


def written(body: dict[str, Any]) -> bytes:
    """As JSON, and what Python's reader takes for it."""
    return json.dumps(body).replace(json.dumps(DIGITS), "9" * 5000).encode()


async def say(client: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> list[Any]:
    """What a stream's choices say, chunk by chunk."""
    body = {**fields, "temperature": 0, "ignore_eos": True, "stream": True}
    text = (await client.post(path, json=body)).text
    *lines, done, _ = text.split("\n\n")
    assert done == "data: [DONE]", text
    return sorted(
        (json.loads(line.removeprefix("data: "))["choices"] for line in lines),
        key=lambda choices: choices[0]["index"],
    )


async def refused(client: httpx.AsyncClient, path: str, raw: bytes) -> str | None:
    """What is wrong with the refusal."""
    response = await client.post(
        path, content=raw, headers={"content-type": "application/json"}, timeout=20
    )
    told = f"{path} {raw[:200]!r}: {response.status_code} {response.text[:300]}"
    if not 400 <= response.status_code < 500:
        return told
    error = response.json()["error"]
    fine = error.keys() == {"message", "type", "param", "code"} and error["message"]
    return None if fine and "Traceback" not in response.text else told


async def test_bad_requests_are_refused_and_healthy_ones_go_on(
    tiny_client: httpx.AsyncClient,
) -> None:
    alone = [await say(tiny_client, *healthy) for healthy in HEALTHY]
    over = asyncio.Event()

    async def healthy() -> int:
        rounds = 0
        while not over.is_set():
            said = await asyncio.gather(*(say(tiny_client, *one) for one in HEALTHY))
            assert texts(said) == texts(alone)
            rounds += 1
        return rounds

    beside = asyncio.create_task(healthy())
    bad = bad_ones()
    found = [wrong for one in bad if (wrong := await refused(tiny_client, *one))]
    over.set()
    assert await beside
    assert not found, "\n".join([f"{len(found)} of {len(bad)}:", *found])


def texts(said: list[list[Any]]) -> list[Any]:
    """Without logprobs, to which company gives another last digit."""
    return [
        [(choice.get("text"), choice.get("delta"), choice["finish_reason"]) for (choice,) in chunks]
        for chunks in said
    ]


async def test_numbers_beyond_all_bounds_may_be_meant(tiny_client: httpx.AsyncClient) -> None:
    for path, body in GOOD.items():
        for name, value in MEANT:
            response = await tiny_client.post(path, json={**body, **AT_ONCE, name: value})
            assert response.status_code == 200, response.text
