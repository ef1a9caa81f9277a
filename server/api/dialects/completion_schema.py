"""The completions API's request and answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moestro.engine import MOST_LOGPROBS
from moestro.server.api import (
    NEUTRAL_ON_COMPLETIONS,
    SamplingFields,
    Usage,
    Whole,
    documented,
    refuse_surrogates,
    understood,
    whole_number,
)

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 128

Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """All four forms, and mixtures: text, ids, or a list of either."""
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "must be a string or a list")
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    if not isinstance(value[0], str | list):
        return [_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt_count", "must be at most {most} prompts", {"most": MAX_PROMPTS}
        )
    return [_text(one) if isinstance(one, str) else _ids(one) for one in value]


def _text(value: str) -> str:
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return refuse_surrogates(value)


def _ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise PydanticCustomError("prompt_type", "must hold strings or lists of token ids")
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    if not all(type(one) is int and one >= 0 for one in value):
        raise PydanticCustomError("prompt_type", "token ids must be whole numbers from 0 on")
    return value


def _log_count(value: object) -> object:
    """A number of likely tokens; false is off, as chat has it."""
    return None if value is False else whole_number(value)


_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_IDS: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0},
}
Prompts = Annotated[
    list[Prompt],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                _IDS,
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                    "items": {"anyOf": [_TEXT, _IDS]},
                },
            ]
        }
    ),
]
LogCount = Annotated[
    int | None,
    PlainValidator(_log_count),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"enum": [None, False]}]}),
]


class CompletionRequest(SamplingFields):
    """Unknown fields are ignored; every optional field may be null."""

    model_config = ConfigDict(json_schema_extra=documented(NEUTRAL_ON_COMPLETIONS))

    prompt: Prompts
    max_tokens: Whole | None = Field(
        None, ge=-1, description="null or absent: 16; -1: what is left; more is cut to it"
    )
    best_of: Whole | None = Field(None, ge=1, le=128, description="of so many, the n likeliest")
    echo: bool | None = Field(None, description="the prompt before the answer")
    logprobs: LogCount = Field(None, description=f"0 to {MOST_LOGPROBS}; null and false are off")
    prompt_logprobs: LogCount = None
    add_special_tokens: bool | None = Field(None, description="null or absent: true")

    @model_validator(mode="before")
    @classmethod
    def _understand(cls, raw: object) -> object:
        return understood(raw, NEUTRAL_ON_COMPLETIONS)

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        self.check_stream_options()
        if self.best_of is not None and self.best_of < self.answers:
            raise PydanticCustomError(
                "best_of", "{param}: must be at least n", {"param": "best_of"}
            )
        if self.best_of not in (None, self.answers) and self.stream:
            raise PydanticCustomError(
                "best_of",
                "{param}: the best are known at the end: not with stream: true",
                {"param": "best_of"},
            )
        if self.max_tokens == 0 and self.candidates > 1:
            raise PydanticCustomError(
                "max_tokens",
                "{param}: 0 leaves nothing to tell answers apart",
                {"param": "max_tokens"},
            )
        return self

    @property
    def candidates(self) -> int:
        """Answers that are made of each prompt."""
        return max(self.answers, self.best_of or 1)

    @property
    def asked_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def answer_scores(self) -> int | None:
        """How many likely tokens are wanted of each generated one; to choose the best needs 0."""
        if self.logprobs is None and self.candidates > self.answers:
            return 0
        return self.logprobs

    @property
    def prompt_scores(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        wanted = [count for count in (echoed, self.prompt_logprobs) if count is not None]
        return max(wanted, default=None)


class LegacyLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(BaseModel):
    """The whole answer; as a chunk of a stream it has a piece of the text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
