"""/v1/completions and /v1/models. Says no before the first byte."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from moestro.engine import PromptTooLong, SamplingParams
from moestro.server.api import (
    Answer,
    ClientGone,
    Completion,
    CompletionRequest,
    EventStream,
    ModelCard,
    ModelList,
    Parts,
    PartsDep,
    SettingsDep,
    Sse,
    WorkerDep,
    whole,
)
from moestro.server.contract import DOCUMENTED, Stream, UnknownModel, Worker
from moestro.server.facts import Settings
from moestro.server.metrics import Track

ENDPOINT = "completions"
CLIENT_GONE_STATUS = 499  # seen by nobody but a log in between

router = APIRouter(prefix="/v1", responses=DOCUMENTED)

_OK: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Completion,
        "description": "The completion, or its pieces as server-sent events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/completions", response_model=None, responses=_OK)
async def create_completion(body: CompletionRequest, request: Request, parts: PartsDep) -> Response:
    """Continues a prompt: OpenAI's completions endpoint for one prompt and one answer."""
    track = Track(parts.metrics, ENDPOINT, request.state.request_id, time.perf_counter())
    _check_model(body.model, parts.settings)
    params = body.sampling()
    ids = await _prompt_ids(body.prompt, parts.worker)
    stream = _submit(parts.worker, ids, params)
    request.state.accepted = True
    track.prompt_tokens = stream.prompt_tokens
    name = parts.settings.served_name
    answer = Answer(id=f"cmpl-{uuid.uuid4().hex}", created=int(time.time()), model=name)
    if body.stream:
        sse = Sse(answer, track, parts.worker, body.include_usage)
        return EventStream(sse, stream, parts.settings.keep_alive)
    return await _whole_response(answer, stream, request, track, parts)


async def _whole_response(
    answer: Answer, stream: Stream, request: Request, track: Track, parts: Parts
) -> Response:
    try:
        completion = await whole(answer, stream, request.receive, track, parts.worker)
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)
    return JSONResponse(completion.model_dump())


def _check_model(name: str | None, settings: Settings) -> None:
    if name is not None and name != settings.served_name:
        raise UnknownModel(
            f"the model {name[:100]!r} does not exist; served here: {settings.served_name!r}"
        )


async def _prompt_ids(prompt: str | list[int], worker: Worker) -> list[int]:
    """Text is encoded in a thread, so that a long prompt stops nobody's stream."""
    most_tokens = worker.model.max_model_len_tokens
    if isinstance(prompt, str):
        return await run_in_threadpool(worker.tokenizer.encode, prompt, most_tokens)
    if len(prompt) > most_tokens:  # before anybody looks at each of them
        raise PromptTooLong.for_context(most_tokens, f"the prompt has {len(prompt)} tokens")
    return prompt


def _submit(worker: Worker, ids: Sequence[int], params: SamplingParams) -> Stream:
    try:
        return worker.submit(ids, params)
    except PromptTooLong as error:
        # Clients recognise a full context by these words.
        limit = f"This model's maximum context length is {worker.model.max_model_len_tokens} tokens"
        words = str(error)
        raise PromptTooLong(words if limit in words else f"{limit}. {words}", "prompt") from error


def _card(worker: Worker, settings: Settings) -> ModelCard:
    model = worker.model
    return ModelCard(
        id=settings.served_name,
        created=model.created_s,
        max_model_len=model.max_model_len_tokens,
    )


@router.get("/models")
async def list_models(worker: WorkerDep, settings: SettingsDep) -> ModelList:
    """What is served."""
    return ModelList(data=[_card(worker, settings)])


@router.get("/models/{name:path}")
async def show_model(name: str, worker: WorkerDep, settings: SettingsDep) -> ModelCard:
    """One served model; names may hold slashes."""
    _check_model(name, settings)
    return _card(worker, settings)
