"""An agent by langchain: calls a tool twice, first whole and then streamed."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: sun"


model = ChatOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", model="demo", max_retries=0)
bound = model.bind_tools([weather])
for streamed in (False, True):
    messages = [HumanMessage("Weather in Bern and Basel?")]
    cities = []
    for _ in range(3):
        if streamed:
            answer = None
            for piece in bound.stream(messages):
                answer = piece if answer is None else answer + piece
        else:
            answer = bound.invoke(messages)
        messages.append(answer)
        for call in answer.tool_calls:
            cities.append(call["args"]["city"])
            messages.append(ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]))
    assert cities == ["Bern", "Basel"], messages
    assert messages[-1].content == "Both are fine.", messages[-1]
print("agent: both ways")
