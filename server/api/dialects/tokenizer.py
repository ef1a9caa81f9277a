"""/tokenize, /detokenize and /tokenizer_info: what clients ask to count and cut as the model does.

At the root and in vLLM's shapes, where lm-eval looks for them; llama-server's names are taken too.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from moestro.engine import BadParameter
from moestro.server.api import SettingsDep, WorkerDep, check_model
from moestro.server.contract import DOCUMENTED, Worker

from .chat_prompt import render
from .chat_schema import ChatRequest, Messages, Object, Tools

# An encoding takes some 200 bytes a token: one at a time, in a thread of its own, so that texts
# longer than any prompt neither take much memory nor the threads that prompts are encoded in.
MOST_AT_ONCE = 1
MOST_TEXT_BYTES = 1 << 20
MOST_IDS = 1 << 18  # of one /detokenize, unless the model's context is longer

T = TypeVar("T")

router = APIRouter(responses=DOCUMENTED)

_limiter: RunVar[CapacityLimiter] = RunVar("moestro_tokenizer_routes")


# Two names of one field each: vLLM's, and llama-server's.
SYNONYMS = (
    ("prompt", "content"),
    ("add_special_tokens", "add_special"),
    ("return_token_strs", "with_pieces"),
)


def _document_synonyms(schema: dict[str, Any]) -> None:
    def null(name: str) -> dict[str, Any]:
        return {"properties": {name: {"type": "null"}}}

    texts = [{"required": [name], "properties": {name: {"type": "string"}}} for name in SYNONYMS[0]]
    alone = [{"anyOf": [null(name), null(other)]} for name, other in SYNONYMS]
    schema["allOf"] = [{"anyOf": texts}, *alone]


class TokenizeRequest(BaseModel):
    """One of `prompt`, `content` (the same) and `messages`. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, json_schema_extra=_document_synonyms)

    model: str | None = None
    prompt: str | None = None
    content: str | None = Field(None, description="llama-server's name for `prompt`")
    messages: Messages | None = Field(None, description="a chat, by the model's template")
    tools: Tools = Field(default_factory=list)
    chat_template_kwargs: Object = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(
        None, description="null or absent: true for a text, false for a chat"
    )
    add_special: bool | None = Field(None, description="llama-server's name for the same")
    return_token_strs: bool | None = None
    with_pieces: bool | None = Field(None, description="llama-server's name for the same")

    @model_validator(mode="after")
    def _one_name_for_each(self) -> "TokenizeRequest":
        for name, other in SYNONYMS:
            if None not in (getattr(self, name), getattr(self, other)):
                raise _refusal("said_twice", other, f"means the same as {name}: send one of them")
        if self.messages is not None and self.text_name is not None:
            raise _refusal("said_twice", "messages", "not together with a text")
        if self.messages is None and self.text_name is None:
            raise _refusal("missing", "prompt", "Field required")
        return self

    @property
    def text_name(self) -> str | None:
        named = (name for name in ("prompt", "content") if getattr(self, name) is not None)
        return next(named, None)

    @property
    def text(self) -> str:
        return (self.prompt or "") + (self.content or "")

    @property
    def adds_special_tokens(self) -> bool:
        said = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        return self.messages is None if said is None else said

    @property
    def chat(self) -> ChatRequest:
        """Its fields were checked as this request's."""
        return ChatRequest.model_construct(
            messages=self.messages or [],
            tools=self.tools,
            chat_template_kwargs=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )

    @property
    def wants_texts(self) -> bool:
        return bool(self.return_token_strs or self.with_pieces)


class Tokenized(BaseModel):
    """`token_strs`, if asked for: each token's text; bytes that are no text as `bytes:\\xe2`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FailFast()]


class Detokenized(BaseModel):
    """The text under vLLM's name and under llama-server's."""

    prompt: str
    content: str


class TokenizerFacts(BaseModel):
    """As in tokenizer_config.json; null for what the tokenizer does not have."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    model_max_length: int


def _refusal(kind: str, param: str, words: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{param}: " + words, {"param": param})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, worker: WorkerDep, settings: SettingsDep) -> Tokenized:
    """The tokens of a text of at most 1 MiB, which may be longer than the model's context."""
    check_model(body.model, settings)
    _check_size(body)
    ids, texts = await _in_thread(partial(_encoded, worker, body))
    return Tokenized(
        count=len(ids),
        max_model_len=worker.model.max_model_len_tokens,
        tokens=ids,
        token_strs=texts,
    )


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, worker: WorkerDep, settings: SettingsDep
) -> Detokenized:
    """The text of tokens, special ones included: what /tokenize was given comes back."""
    check_model(body.model, settings)
    _check_ids(body.tokens, worker)
    decode = partial(worker.tokenizer.decode, body.tokens, skip_special_tokens=False)
    text = await _in_thread(decode)
    return Detokenized(prompt=text, content=text)


@router.get("/tokenizer_info")
async def tokenizer_info(worker: WorkerDep) -> TokenizerFacts:
    """What lm-eval and others need to use this server's tokenizer as their own."""
    info = worker.tokenizer.info
    template = info.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return TokenizerFacts(
        bos_token=info.bos_token,
        eos_token=info.eos_token,
        pad_token=info.pad_token,
        chat_template=template,
        model_max_length=worker.model.max_model_len_tokens,
    )


def _check_size(body: TokenizeRequest) -> None:
    name = body.text_name or "messages"
    try:
        size_bytes = len(body.text.encode("utf-8"))
    except UnicodeEncodeError:
        raise BadParameter(f"{name}: has a lone surrogate", name) from None
    _refuse_too_much(name, size_bytes)


def _refuse_too_much(name: str, size_bytes: int) -> None:
    if size_bytes > MOST_TEXT_BYTES:
        raise BadParameter(
            f"{name}: {size_bytes} bytes are too many, the most is {MOST_TEXT_BYTES}", name
        )


def _encoded(worker: Worker, body: TokenizeRequest) -> tuple[list[int], list[str] | None]:
    tokenizer, text = worker.tokenizer, body.text
    if body.messages is not None:
        text = render(body.chat, tokenizer)
        _refuse_too_much("messages", len(text.encode("utf-8", "surrogatepass")))
    ids = tokenizer.encode(text, add_special_tokens=body.adds_special_tokens)
    texts = [tokenizer.token_text(token) for token in ids] if body.wants_texts else None
    return ids, texts


def _check_ids(ids: list[int], worker: Worker) -> None:
    model = worker.model
    most = max(MOST_IDS, model.max_model_len_tokens)
    if len(ids) > most:
        raise BadParameter(f"tokens: {len(ids)} are too many, the most is {most}", "tokens")
    if ids and max(ids) >= model.vocab_size:
        raise BadParameter(
            f"tokens: has ids outside the vocabulary (0 to {model.vocab_size - 1})", "tokens"
        )


def limiter() -> CapacityLimiter:
    """This event loop's."""
    try:
        return _limiter.get()
    except LookupError:
        _limiter.set(CapacityLimiter(MOST_AT_ONCE))
        return _limiter.get()


async def _in_thread(work: Callable[[], T]) -> T:
    return await to_thread.run_sync(work, limiter=limiter())
