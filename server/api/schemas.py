"""OpenAI's request and response objects, as far as they are served.

What is not served is refused by name, unless it has the value that changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moestro.engine import SamplingParams
from moestro.server.contract import UNSUPPORTED

MAX_STOPS = 16
DEFAULT_MAX_TOKENS = 16

# Field -> values that mean "off" (null always does). Anything else would change the answer.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "prompt_logprobs": (),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "return_token_ids": (False,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    # True == 1 in Python, but not in a request.
    return value is None or any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def _refuse_surrogates(text: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PydanticCustomError("invalid_text", "has a lone surrogate") from None
    return text


def _check_prompt(value: object) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str) and value:
        return _refuse_surrogates(value)
    if isinstance(value, list) and value:
        return _check_ids(value)
    if value in ("", []):
        raise PydanticCustomError("empty_prompt", "must not be empty")
    raise PydanticCustomError("prompt_type", "must be a string or a list of token ids")


def _check_ids(values: list[object]) -> list[int]:
    ids = [value for value in values if type(value) is int and value >= 0]
    if len(ids) == len(values):
        return ids
    if all(isinstance(value, str | list) for value in values):
        raise PydanticCustomError(UNSUPPORTED, "several prompts in one request: not supported yet")
    raise PydanticCustomError("prompt_type", "token ids must be whole numbers from 0 on")


def _check_stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PydanticCustomError(
            "stop_type", "must be a non-empty string or a list of non-empty strings"
        )
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError(
            "stop_count", "must be at most {limit} strings", {"limit": MAX_STOPS}
        )
    return tuple(_refuse_surrogates(stop) for stop in stops)


Prompt = Annotated[
    str | list[int],
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
            ]
        }
    ),
]
Stops = Annotated[
    tuple[str, ...],
    PlainValidator(_check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "maxItems": MAX_STOPS,
                    "items": {"type": "string", "minLength": 1},
                },
                {"type": "null"},
            ]
        }
    ),
]
Unit = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]


def _document_refusals(schema: dict[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        schema["properties"][name] = {
            "enum": [None, *neutral],
            "description": "Not supported yet: only the value that changes nothing is accepted.",
        }


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """Unknown fields are ignored; every optional field may be null."""

    # Strict: neither true nor "3" is a number.
    model_config = ConfigDict(strict=True, frozen=True, json_schema_extra=_document_refusals)

    model: str | None = None
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=1, description="null or absent: 16")
    temperature: Temperature | None = Field(None, description="null or absent: 1; 0 is greedy")
    top_p: Unit | None = None
    top_k: int | None = Field(None, ge=-1, description="-1, 0 and null are off")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = ()
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, raw: object) -> object:
        given: dict[str, object] = raw if isinstance(raw, dict) else {}
        for name in (name for name in NEUTRAL if name in given):
            if not _is_neutral(given[name], NEUTRAL[name]):
                raise PydanticCustomError(
                    UNSUPPORTED, "{param}: not supported yet, leave it out", {"param": name}
                )
        return raw

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "needs_stream",
                "{param}: only allowed with stream: true",
                {"param": "stream_options"},
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> SamplingParams:
        """BadParameter where the engine is stricter than the schema."""
        return SamplingParams(
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=bool(self.ignore_eos),
        )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> "Usage":
        total_tokens = prompt_tokens + completion_tokens
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=total_tokens,
        )


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The whole answer; as a chunk of a stream it has a piece of the text and no usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moestro"] = "moestro"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
