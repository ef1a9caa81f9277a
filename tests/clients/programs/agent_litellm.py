"""An agent by litellm: calls a tool twice, first whole and then streamed."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import litellm

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
common = {"model": "hosted_vllm/demo", "api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
for streamed in (False, True):
    messages = [{"role": "user", "content": "Weather in Bern and Basel?"}]
    cities = []
    for _ in range(3):
        answer = litellm.completion(**common, messages=messages, tools=TOOLS, stream=streamed)
        if streamed:
            answer = litellm.stream_chunk_builder(list(answer), messages=messages)
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            cities.append(json.loads(call.function.arguments)["city"])
            content = f"{cities[-1]}: sun"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    assert cities == ["Bern", "Basel"], messages
    assert messages[-1]["content"] == "Both are fine.", messages[-1]
print("agent: both ways")
