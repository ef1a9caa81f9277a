"""litellm under the three names by which it reaches such a server."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import litellm

url = f"{sys.argv[1]}/v1"
HI = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = set()
for provider in ("openai", "hosted_vllm"):
    common = {
        "model": f"{provider}/demo",
        "messages": HI,
        "api_base": url,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 12,
    }
    whole = litellm.completion(**common)
    TEXTS.add(whole.choices[0].message.content)
    assert whole.usage.completion_tokens == 12
    pieces = list(litellm.completion(**common, stream=True, stream_options={"include_usage": True}))
    TEXTS.add("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices))
    assert pieces[-1].usage.completion_tokens == 12
assert len(TEXTS) == 1, TEXTS
plain = {"model": "text-completion-openai/demo", "api_base": url, "api_key": "none"}
whole = litellm.text_completion(**plain, prompt="Gravity is", temperature=0, max_tokens=8)
pieces = litellm.text_completion(
    **plain, prompt="Gravity is", temperature=0, max_tokens=8, stream=True
)
assert "".join(piece.choices[0].text or "" for piece in pieces) == whole.choices[0].text
try:
    litellm.completion(
        model="openai/demo",
        messages=[{"role": "user", "content": "word " * 20_000}],
        api_base=url,
        api_key="none",
    )
except litellm.ContextWindowExceededError as error:
    assert "maximum context length" in str(error)
else:
    raise AssertionError("nothing was refused")
print("litellm: all served")
