"""langchain-openai: both of its classes, streamed and in batches."""

import sys

from langchain_openai import ChatOpenAI, OpenAI

options = {
    "base_url": f"{sys.argv[1]}/v1",
    "api_key": "none",
    "model": "demo",
    "temperature": 0,
    "max_tokens": 12,
}
plain = OpenAI(**options)
text = plain.invoke("Gravity is")
assert text and "".join(plain.stream("Gravity is")) == text
assert plain.batch(["Gravity is", "The sky is"])[0] == text

chat = ChatOpenAI(**options)
answer = chat.invoke("What is the capital of France?")
assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] == 12
assert "".join(piece.content for piece in chat.stream("What is the capital of France?")) == (
    answer.content
)
usage = ChatOpenAI(**options, stream_usage=True)
pieces = list(usage.stream("What is the capital of France?"))
assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) == 12
assert [one.content for one in chat.batch(["What is the capital of France?"] * 2)] == (
    [answer.content] * 2
)
logged = ChatOpenAI(**options, logprobs=True, top_logprobs=1).invoke("Hi")
assert len(logged.response_metadata["logprobs"]["content"]) == 12
print("langchain: all served")
