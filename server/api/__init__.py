"""What routes are made of: schemas, streams, middleware, and the routes about the server itself."""

from .cors import Cors
from .deps import Parts, PartsDep, SettingsDep, WorkerDep
from .middleware import OPEN_PATHS, ApiKey, BodyLimit, HeadAsGet, RequestIds
from .ops import router as ops_router
from .schemas import Completion, CompletionRequest, ModelCard, ModelList
from .stream import KEEP_ALIVE, Answer, ClientGone, EventStream, Sse, whole

__all__ = [
    "Answer",
    "ApiKey",
    "BodyLimit",
    "ClientGone",
    "Completion",
    "CompletionRequest",
    "Cors",
    "EventStream",
    "HeadAsGet",
    "KEEP_ALIVE",
    "ModelCard",
    "ModelList",
    "OPEN_PATHS",
    "Parts",
    "PartsDep",
    "RequestIds",
    "SettingsDep",
    "Sse",
    "WorkerDep",
    "ops_router",
    "whole",
]
