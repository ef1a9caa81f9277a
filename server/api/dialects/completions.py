"""/v1/completions. Says no before the first byte."""

import time

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from moestro.engine import PromptTooLong
from moestro.server.api import (
    Head,
    Parts,
    PartsDep,
    answered,
    check_model,
    check_structure,
    respond,
    submit_all,
    tokens_to_make,
)
from moestro.server.contract import DOCUMENTED, Tokens
from moestro.server.metrics import Track

from .completion_reply import CompletionReply, Encoded
from .completion_schema import Completion, CompletionRequest, Prompt

ENDPOINT = "completions"

router = APIRouter(prefix="/v1", responses=DOCUMENTED)


@router.post("/completions", response_model=None, responses=answered(Completion))
async def create_completion(body: CompletionRequest, request: Request, parts: PartsDep) -> Response:
    """Continues prompts: OpenAI's completions endpoint."""
    track = Track(parts.metrics, ENDPOINT, request.state.request_id, time.perf_counter())
    check_model(body.model, parts.settings)
    grammar = await check_structure(body.structure, parts.worker)
    prompts = [await _encode(prompt, body, parts) for prompt in body.prompt]
    answers, density = body.candidates, body.expert_density(parts)
    params = [
        body.sampling(
            tokens_to_make(body.asked_tokens, len(prompt.ids), answers, density, parts.worker),
            n=answers,
            expert_density=density,
            grammar=grammar,
            logprobs=body.answer_scores,
            prompt_logprobs=body.prompt_scores,
        )
        for prompt in prompts
    ]
    stream = submit_all(parts.worker, [prompt.ids for prompt in prompts], params)
    head = Head.new("cmpl", parts.settings.served_name)
    reply = CompletionReply(head, body, prompts, parts.worker.tokenizer)
    return await respond(reply, stream, track, body, request, parts)


async def _encode(prompt: Prompt, body: CompletionRequest, parts: Parts) -> Encoded:
    """In a thread, so that a long prompt stops nobody's stream."""
    most_tokens = parts.worker.model.max_model_len_tokens
    if isinstance(prompt, str):
        return await run_in_threadpool(
            _encode_text, prompt, body, parts.worker.tokenizer, most_tokens
        )
    if len(prompt) > most_tokens:  # before anybody looks at each of them
        raise PromptTooLong.for_context(most_tokens, f"the prompt has {len(prompt)} tokens")
    return await run_in_threadpool(_show_ids, prompt, body, parts)


def _encode_text(prompt: str, body: CompletionRequest, tokens: Tokens, most_tokens: int) -> Encoded:
    special = body.add_special_tokens is not False
    if not body.echo:
        return Encoded(tokens.encode(prompt, most_tokens, add_special_tokens=special))
    return Encoded(*tokens.encode_with_texts(prompt, most_tokens, add_special_tokens=special))


def _show_ids(prompt: list[int], body: CompletionRequest, parts: Parts) -> Encoded:
    known = all(token < parts.worker.model.vocab_size for token in prompt)
    if not body.echo or not known:  # the engine refuses what nobody knows
        return Encoded(prompt)
    skip = body.skip_special_tokens is not False
    return Encoded(prompt, parts.worker.tokenizer.texts(prompt, skip_special_tokens=skip))
