"""The chat API's request and answer."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moestro.engine import MOST_LOGPROBS
from moestro.server.api import (
    NEUTRAL_ON_CHAT,
    SamplingFields,
    Usage,
    Whole,
    documented,
    refuse_surrogates,
    understood,
)
from moestro.server.contract import UNSUPPORTED

MAX_MESSAGES = 4096
MAX_TOOLS = 128
TEXT_PARTS = ("text", "input_text", "output_text")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Of a message, beside role, content and tool_calls: what templates know.
KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")

Json = dict[str, Any]


def _messages(value: object) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("messages", "must be a list of messages, and not empty")
    if len(value) > MAX_MESSAGES:
        raise PydanticCustomError(
            "messages", "must be at most {most} messages", {"most": MAX_MESSAGES}
        )
    return [_message(one) for one in value]


def _message(value: object) -> Json:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise PydanticCustomError("messages", "each must be an object with a role")
    message: Json = {"role": refuse_surrogates(value["role"])}
    message["content"] = _content(value.get("content"))
    calls = value.get("tool_calls")
    if calls:
        message["tool_calls"] = _calls(calls)
    elif value.get("content") is None and value["role"] != "assistant":
        raise PydanticCustomError("messages", "each needs content, or tool_calls")
    for name in KEPT:
        if isinstance(kept := value.get(name), str):
            message[name] = refuse_surrogates(kept)
    return message


def _content(value: object) -> str | list[Json]:
    if value is None:
        return ""
    if isinstance(value, str):
        return refuse_surrogates(value)
    if not isinstance(value, list):
        raise PydanticCustomError("messages", "content must be a string or a list of parts")
    return [{"type": "text", "text": _part(one)} for one in value]


def _part(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind in TEXT_PARTS and isinstance(value.get("text"), str):
        return refuse_surrogates(value["text"])
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        raise PydanticCustomError(
            UNSUPPORTED, "parts of type {kind} are not supported: text alone", {"kind": kind[:40]}
        )
    raise PydanticCustomError("messages", "a part must be an object with type and text")


def _calls(value: object) -> list[Json]:
    if not isinstance(value, list):
        raise PydanticCustomError("messages", "tool_calls must be a list")
    return [_call(one) for one in value]


def _call(value: object) -> Json:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        raise PydanticCustomError("messages", "a tool call must be an object with a function")
    name, arguments = function.get("name"), function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise PydanticCustomError(
            "messages", "a tool call's function needs a name, and arguments that are a JSON object"
        )
    called = {"name": refuse_surrogates(name), "arguments": arguments}
    identity = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**identity, "type": "function", "function": called}


def _tools(value: object) -> list[Json]:
    given = [] if value is None else value
    if not isinstance(given, list) or len(given) > MAX_TOOLS:
        raise PydanticCustomError(
            "tools", "must be a list of at most {most} tools", {"most": MAX_TOOLS}
        )
    for one in given:
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict) or one.get("type", "function") != "function":
            raise PydanticCustomError("tools", "each must be of type function, with a function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise PydanticCustomError("tools", "each function needs a name")
        if not isinstance(function.get("parameters") or {}, dict):
            raise PydanticCustomError("tools", "a function's parameters must be a JSON schema")
    return [{**one, "type": "function"} for one in given]


def _tool_choice(value: object) -> str | None:
    """none, auto, required; or "=NAME" for the one function that must be called."""
    if value is None or value in ("none", "auto", "required"):
        return None if value is None else str(value)
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return f"={function['name']}"
    raise PydanticCustomError("tool_choice", "must be none, auto, required, or name a function")


def _object(value: object) -> Json:
    if value is not None and not isinstance(value, dict):
        raise PydanticCustomError("object", "must be an object")
    return value or {}


_FUNCTION = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_PART = {
    "type": "object",
    "properties": {"type": {"enum": list(TEXT_PARTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
    },
    "required": ["role", "content"],
}
_CALL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "arguments": {
                    "anyOf": [
                        {"type": "object"},
                        {"type": "string", "contentMediaType": "application/json"},
                        {"type": "null"},
                    ]
                },
            },
            "required": ["name"],
        },
    },
    "required": ["function"],
}
_SILENT = {  # an assistant's, that may be calls alone
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "null"},
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
    },
    "required": ["role"],
}
Messages = Annotated[
    list[Json],
    PlainValidator(_messages),
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
            "items": {"anyOf": [_MESSAGE, _SILENT]},
        }
    ),
]
Tools = Annotated[
    list[Json],
    PlainValidator(_tools),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "maxItems": MAX_TOOLS, "items": _FUNCTION}, {"type": "null"}]}
    ),
]
ToolChoice = Annotated[
    str | None,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": [None, "none", "auto", "required"]}, _FUNCTION]}),
]
Object = Annotated[
    Json,
    PlainValidator(_object),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]}),
]


class ChatRequest(SamplingFields):
    """Unknown fields are ignored; every optional field may be null."""

    model_config = ConfigDict(json_schema_extra=documented(NEUTRAL_ON_CHAT))

    messages: Messages
    max_tokens: Whole | None = Field(
        None, ge=-1, description="null, absent and -1: what is left; more is cut to it"
    )
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(None, json_schema_extra={"enum": [None, *EFFORTS]})
    chat_template_kwargs: Object = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _understand(cls, raw: object) -> object:
        return understood(raw, NEUTRAL_ON_CHAT)

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        self.check_stream_options()
        if self.max_tokens == 0:
            raise _wrong("max_tokens", "0 leaves no room for an answer")
        if self.top_logprobs and not self.logprobs:
            raise _wrong("top_logprobs", "needs logprobs: true")
        if self.reasoning_effort not in (None, *EFFORTS):
            raise _wrong("reasoning_effort", f"must be one of {', '.join(EFFORTS)}")
        if self.must_call and not self.tools:
            raise _wrong("tool_choice", "needs tools")
        names = {tool["function"]["name"] for tool in self.tools}
        if self.called_name is not None and self.called_name not in names:
            raise _wrong("tool_choice", "names a function that is not among the tools")
        if self.structure is not None and self.tools_for_model:
            raise _wrong(self.structure[0], "not together with tools, unless tool_choice is none")
        if self.continue_final_message and self.add_generation_prompt:
            raise _wrong("add_generation_prompt", "not with continue_final_message")
        return self

    @property
    def asked_tokens(self) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    @property
    def called_name(self) -> str | None:
        """The one function that must be called."""
        choice = self.tool_choice or ""
        return choice[1:] if choice.startswith("=") else None

    @property
    def tools_for_model(self) -> list[Json]:
        return [] if self.tool_choice == "none" else self.tools

    @property
    def scores(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _wrong(param: str, words: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{param}: {words}", {"param": param, "words": words})


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
