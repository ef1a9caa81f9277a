"""/v1/chat/completions. Says no before the first byte."""

import time

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from moestro.server.api import (
    Head,
    PartsDep,
    answered,
    check_model,
    check_structure,
    respond,
    submit_all,
    tokens_to_make,
)
from moestro.server.contract import DOCUMENTED
from moestro.server.metrics import Track

from .chat_calls import forced_calls
from .chat_prompt import converse
from .chat_reply import ChatReply
from .chat_schema import ChatCompletion, ChatRequest

ENDPOINT = "chat"

router = APIRouter(prefix="/v1", responses=DOCUMENTED)


@router.post("/chat/completions", response_model=None, responses=answered(ChatCompletion))
async def create_chat_completion(body: ChatRequest, request: Request, parts: PartsDep) -> Response:
    """Answers a conversation: OpenAI's chat endpoint, with tools and reasoning."""
    track = Track(parts.metrics, ENDPOINT, request.state.request_id, time.perf_counter())
    check_model(body.model, parts.settings)
    worker = parts.worker
    most_tokens = worker.model.max_model_len_tokens
    structure = forced_calls(body) or body.structure
    grammar = await check_structure(structure, worker)
    conversation = await run_in_threadpool(converse, body, worker.tokenizer, most_tokens)
    density = body.expert_density(parts)
    params = body.sampling(
        tokens_to_make(body.asked_tokens, len(conversation.ids), body.answers, density, worker),
        n=body.answers,
        expert_density=density,
        logprobs=body.scores,
        grammar=grammar,
        skip_special_tokens=not conversation.reads_markers
        and body.skip_special_tokens is not False,
    )
    stream = submit_all(worker, [conversation.ids], [params])
    head = Head.new("chatcmpl", parts.settings.served_name)
    reply = ChatReply(head, body, conversation, worker.tokenizer)
    return await respond(reply, stream, track, body, request, parts)
