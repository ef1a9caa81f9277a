"""What routes are made of: fields, streams, middleware, and the routes about the server itself."""

from .cors import Cors
from .deps import Parts, PartsDep, SettingsDep, WorkerDep
from .fields import (
    ALIASES,
    NEUTRAL,
    NEUTRAL_ON_CHAT,
    NEUTRAL_ON_COMPLETIONS,
    WINDOWS,
    documented,
    understood,
)
from .joined import Joined, submit_all
from .middleware import OPEN_PATHS, ApiKey, BodyLimit, HeadAsGet, RequestIds
from .ops import router as ops_router
from .respond import Head, answered, check_model, respond
from .sampling import SamplingFields, tokens_to_make
from .schemas import ModelCard, ModelList, Usage
from .stream import KEEP_ALIVE
from .structure import STRUCTURES, check_structure
from .token_log import Entry, TokenLog, by_id, legacy, openai_chat, prompt_entries
from .values import Whole, refuse_surrogates, whole_number

__all__ = [
    "ALIASES",
    "ApiKey",
    "BodyLimit",
    "Entry",
    "Head",
    "Joined",
    "KEEP_ALIVE",
    "ModelCard",
    "ModelList",
    "NEUTRAL",
    "NEUTRAL_ON_CHAT",
    "NEUTRAL_ON_COMPLETIONS",
    "Cors",
    "HeadAsGet",
    "OPEN_PATHS",
    "Parts",
    "PartsDep",
    "RequestIds",
    "STRUCTURES",
    "SamplingFields",
    "SettingsDep",
    "TokenLog",
    "Usage",
    "WINDOWS",
    "Whole",
    "WorkerDep",
    "answered",
    "by_id",
    "check_model",
    "check_structure",
    "documented",
    "legacy",
    "openai_chat",
    "ops_router",
    "prompt_entries",
    "refuse_surrogates",
    "respond",
    "submit_all",
    "tokens_to_make",
    "understood",
    "whole_number",
]
