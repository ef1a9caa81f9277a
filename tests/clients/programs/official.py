"""OpenAI's own client, whichever version runs this: everything that it can ask of the two APIs."""

import json
import sys
import threading
import urllib.request

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=120)
HI = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "demo", "temperature": 0}


def tokens_of(text: str) -> list[int]:
    request = urllib.request.Request(
        f"{sys.argv[1]}/tokenize",
        json.dumps({"prompt": text}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def completions() -> None:
    texts = set()
    ids = tokens_of("Gravity is")
    for prompt in ("Gravity is", ["Gravity is"], ids, [ids]):
        whole = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
        texts.add(whole.choices[0].text)
    echoed = client.completions.create(
        prompt="Gravity is", max_tokens=1, echo=True, logprobs=1, **GREEDY
    )
    logs = echoed.choices[0].logprobs
    assert "".join(logs.tokens) == echoed.choices[0].text
    assert logs.token_logprobs[0] is None and len(logs.tokens) == echoed.usage.total_tokens
    stream = client.completions.create(
        prompt="Gravity is",
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    texts.add("".join(chunk.choices[0].text for chunk in chunks if chunk.choices))
    assert len(texts) == 1, texts
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    asked = {"model": "demo", "prompt": ["A", "B c"], "n": 2, "max_tokens": 4, "seed": 1}
    several = client.completions.create(**asked, extra_body={"min_tokens": 2})
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.completion_tokens >= 8
    again = client.completions.create(**asked, extra_body={"min_tokens": 2})
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices]


def chat() -> None:
    whole = client.chat.completions.create(
        messages=HI, max_completion_tokens=16, logprobs=True, top_logprobs=2, **GREEDY
    )
    choice = whole.choices[0]
    assert "Paris" in choice.message.content, choice
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    stream = client.chat.completions.create(
        messages=HI,
        max_completion_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [{"type": "text", "text": HI[0]["content"]}]
    joined = client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], max_completion_tokens=16, **GREEDY
    )
    assert joined.choices[0].message.content == text


def structured() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        messages=HI,
        max_completion_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
        **GREEDY,
    )
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"city", "big"}, found


def errors() -> None:
    for status, ask in (
        (404, lambda: client.completions.create(model="other", prompt="x")),
        (400, lambda: client.completions.create(model="demo", prompt="x", temperature=3)),
        (400, lambda: client.completions.create(model="demo", prompt="word " * 20_000)),
        (400, lambda: client.chat.completions.create(model="demo", messages=[])),
    ):
        try:
            ask()
        except openai.APIStatusError as error:
            assert error.status_code == status, error
            assert error.code and error.param and error.type == "invalid_request_error", error.body
            assert error.request_id
        else:
            raise AssertionError("nothing was refused")


def together() -> None:
    """Eight at once, and each as if alone."""
    prompts = [f"Number {number} is" for number in range(8)]

    def ask(prompt: str) -> str:
        made = client.completions.create(
            model="demo", prompt=prompt, max_tokens=12, seed=7, temperature=0.8
        )
        return made.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda prompt=prompt: found.update({prompt: ask(prompt)}))
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[prompt] for prompt in prompts] == alone


names = [model.id for model in client.models.list()]
assert names == ["demo"] and client.models.retrieve("demo").id == "demo"
completions()
chat()
structured()
errors()
together()
print(f"openai {openai.__version__}: all served")
