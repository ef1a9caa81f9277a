"""Agents of two libraries over the fake engine, which writes calls as a model of a format does."""

import asyncio

import pytest

from chat_formats import FORMATS, ChatFormat, written
from chat_kit import chatting, says
from client_environments import Run
from web_server import serving

FEW = [form for form in FORMATS if form.template in ("hermes", "harmony")]


@pytest.mark.parametrize("form", FEW, ids=lambda form: form.template)
@pytest.mark.parametrize("library", ["langchain", "litellm"])
async def test_an_agent_calls_a_tool_twice(
    library: str, form: ChatFormat, run_program: Run
) -> None:
    def call(city: str) -> str:
        function = {"name": "weather", "arguments": {"city": city}}
        return written(form.template, {"role": "assistant", "tool_calls": [{"function": function}]})

    final = written(form.template, {"role": "assistant", "content": "Both are fine."})
    worker = chatting(form)
    worker.script = says(*[call("Bern"), call("Basel"), final] * 2, seed=3)
    async with serving(worker) as url:
        said = await asyncio.to_thread(run_program, library, f"agent_{library}.py", url)
    assert "both ways" in said
    assert len(worker.submitted) == 6
