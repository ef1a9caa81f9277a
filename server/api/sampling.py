"""The fields that say how tokens are chosen: the same in all APIs."""

from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from moestro.engine import GrammarRefused, PromptTooLong, SamplingParams
from moestro.server.contract import Worker

from .deps import Parts
from .structure import STRUCTURES, AnyJson, Structure, structure_of
from .values import Biases, Number, Penalty, Seed, Share, StopIds, Stops, Temperature, Whole

MAX_ANSWERS = 128  # more is a mistake; the engine's own limit is lower
REST = -1  # of max_tokens: what is left


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(None, description="the usage in every chunk")


class ExpertsFields(BaseModel):
    """Who chooses the experts of the answer: each token, or the prompt for all of it.

    In mode sequence the prompt chooses neurons, too, where the model has shared experts or layers
    without experts; not of factorized models, whose shared expert is needed always.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    mode: Literal["token", "sequence"]
    density: Number | None = Field(
        None,
        gt=0,
        le=1,
        description="share of experts, and of neurons that all tokens run, that the prompt keeps;"
        " of sequence alone",
    )

    @model_validator(mode="after")
    def _keeps_something(self) -> Self:
        if self.mode == "token" and self.density is not None:
            raise PydanticCustomError(
                "density", "{param}: density belongs to mode sequence", {"param": "experts"}
            )
        return self


class SamplingFields(BaseModel):
    """Unknown fields are ignored; every optional field may be null."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = None
    max_tokens: Whole | None = Field(
        None, ge=-1, description="-1: what is left; more than is left is cut to it"
    )
    min_tokens: Whole | None = Field(None, ge=0)
    temperature: Temperature | None = Field(None, description="null or absent: 1; 0 is greedy")
    top_p: Share | None = Field(None, description="0 is greedy")
    top_k: Whole | None = Field(None, ge=-1, description="-1, 0 and null are off")
    min_p: Share | None = None
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases = ()
    seed: Seed | None = Field(None, description="-1 and null: another one each time")
    n: Whole | None = Field(None, ge=1, le=MAX_ANSWERS)
    stop: Stops = ()
    stop_token_ids: StopIds = ()
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    experts: ExpertsFields | None = Field(None, description="null or absent: as the server is set")
    response_format: AnyJson = None
    structured_outputs: AnyJson = None
    guided_json: AnyJson = None
    guided_json_object: AnyJson = None
    guided_regex: AnyJson = None
    guided_choice: AnyJson = None
    json_schema: AnyJson = None
    regex: AnyJson = None

    @model_validator(mode="after")
    def _has_one_structure(self) -> Self:
        try:
            _ = self.structure
        except GrammarRefused as error:
            raise PydanticCustomError(
                "structure", "{param}: {words}", {"param": "response_format", "words": str(error)}
            ) from error
        return self

    @cached_property  # asked for at several places, and a schema may be long
    def structure(self) -> Structure | None:
        """What the answer must look like."""
        return structure_of({name: getattr(self, name) for name in STRUCTURES})

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def expert_density(self, parts: Parts) -> float | None:
        """Share of the experts that the prompt keeps for the answer; None: tokens choose.

        A model without a router has experts chosen by the prompt unless somebody says otherwise.
        """
        settings, own = parts.settings, parts.worker.model.sequence_density
        mode = settings.experts_mode or ("sequence" if own else "token")
        if self.experts is not None:
            mode = self.experts.mode
        if mode == "token":
            return None
        asked = None if self.experts is None else self.experts.density
        return settings.density_kept(own) if asked is None else asked

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "needs_stream",
                "{param}: only allowed with stream: true",
                {"param": "stream_options"},
            )

    def sampling(self, max_tokens: int, **more: Any) -> SamplingParams:
        """BadParameter where the engine is stricter than the schema."""
        greedy = self.top_p == 0
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=0.0 if greedy else _or(self.temperature, 1.0),
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if greedy else _or(self.top_p, 1.0),
            min_p=self.min_p or 0.0,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias,
            seed=None if self.seed == -1 else self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            **{"skip_special_tokens": self.skip_special_tokens is not False, "n": 1, **more},
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def tokens_to_make(
    asked: int, prompt_tokens: int, answers: int, density: float | None, worker: Worker
) -> int:
    """`asked`, or what is left of the context where that is less. Raises PromptTooLong.

    `density` of the experts that the prompt keeps; None: tokens choose.
    """
    if asked == 0:
        return 0
    left = worker.most_new_tokens(prompt_tokens, answers, density)
    if left < 1:
        what = f"the prompt has {prompt_tokens} tokens"
        what += f" and {answers} answers were asked for" if answers > 1 else ""
        if density is not None and worker.most_new_tokens(prompt_tokens, answers) > 0:
            raise PromptTooLong(
                f"{what}: copies of the neurons that it keeps at density {density:g} leave the KV"
                " cache no room; ask for a smaller density of experts, or for mode token"
            )
        raise PromptTooLong.for_context(worker.model.max_model_len_tokens, what)
    return left if asked == REST else min(asked, left)
