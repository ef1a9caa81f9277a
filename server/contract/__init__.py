"""The engine as the server sees it: its members, and its errors as HTTP answers."""

from .errors import (
    DOCUMENTED,
    DOWN,
    HTTP_ROWS,
    INVALID,
    REJECTIONS,
    UNSUPPORTED,
    BodyTooLarge,
    ErrorResponse,
    GenerationFailed,
    Problem,
    Row,
    UnknownModel,
    answer,
    problem_of,
    state_problem,
)
from .protocols import Stream, Tokens, Worker

__all__ = [
    "BodyTooLarge",
    "DOCUMENTED",
    "DOWN",
    "ErrorResponse",
    "GenerationFailed",
    "HTTP_ROWS",
    "INVALID",
    "Problem",
    "REJECTIONS",
    "Row",
    "Stream",
    "Tokens",
    "UNSUPPORTED",
    "UnknownModel",
    "Worker",
    "answer",
    "problem_of",
    "state_problem",
]
