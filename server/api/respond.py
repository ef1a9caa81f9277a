"""From an accepted request to its response: whole, or as it comes."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from moestro.server.contract import UnknownModel
from moestro.server.facts import Settings
from moestro.server.metrics import Track

from .deps import Parts
from .joined import Joined
from .sampling import SamplingFields
from .stream import ClientGone, EventStream, Reply, Sse, whole

EXPERTS_HEADER = "X-Moestro-Experts"
CLIENT_GONE_STATUS = 499  # seen by nobody but a log in between


@dataclass(frozen=True, slots=True)
class Head:
    """What is the same in every piece of one answer."""

    id: str
    created_s: int
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> "Head":
        return cls(f"{kind}-{uuid.uuid4().hex}", int(time.time()), model)

    def fields(self) -> dict[str, str | int]:
        return {"id": self.id, "created": self.created_s, "model": self.model}


def check_model(name: str | None, settings: Settings) -> None:
    """Raises UnknownModel."""
    if name is not None and name != settings.served_name:
        raise UnknownModel(
            f"the model {name[:100]!r} does not exist; served here: {settings.served_name!r}"
        )


def answered(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the whole answer, or events."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {
        200: {
            "model": model,
            "description": "The answer, or its pieces as server-sent events",
            "content": {"text/event-stream": {"schema": event}},
        }
    }


async def respond(
    reply: Reply,
    stream: Joined,
    track: Track,
    body: SamplingFields,
    request: Request,
    parts: Parts,
) -> Response:
    """Takes over the stream of a request that the engine has accepted: it is let go whatever
    happens.
    """
    request.state.accepted = True
    track.prompt_tokens = stream.prompt_tokens
    density, neuron_layers = body.expert_density(parts), parts.worker.model.neuron_layers
    headers = {EXPERTS_HEADER: experts_words(density, neuron_layers)}
    if body.stream:
        sse = Sse(reply, track, parts.worker, body.include_usage, body.usage_in_every_chunk)
        return EventStream(sse, stream, parts.settings.keep_alive, headers)
    try:
        answer = await whole(reply, stream, request.receive, track, parts.worker)
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)
    return Response(answer, media_type="application/json", headers=headers)


def experts_words(density: float | None, neuron_layers: int) -> str:
    """Who was asked to choose the experts, known before the prompt is computed.

    In mode sequence also in how many MLPs of the model neurons are chosen with them.
    """
    if density is None:
        return "token"
    words = f"sequence; density={density:g}"
    return f"{words}; neuron-layers={neuron_layers}" if neuron_layers else words
