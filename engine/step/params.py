"""How one request wants its tokens chosen. Frozen; checked where it is made."""

import math
from dataclasses import dataclass

from moestro.engine.facts import BadParameter, GrammarSpec

MOST_LOGPROBS = 20
MOST_BIAS = 100.0
MOST_PENALTY = 2.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Defaults change nothing. `temperature` 0 is greedy, `top_k` 0 and `min_p` 0 are off.

    Logits are changed in this order: penalties, bias, what is not allowed (a grammar, the end
    before `min_tokens`), temperature, top_k, top_p, min_p. Log probabilities are the model's own,
    from before all of it.
    """

    max_tokens: int = 16  # 0: the prompt is computed, nothing is generated
    min_tokens: int = 0  # before them no stop token can be chosen
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0  # tokens less likely than this times the most likely one are out
    repetition_penalty: float = 1.0  # of tokens in the prompt or the answer: logits divided by it
    presence_penalty: float = 0.0  # of tokens in the answer: subtracted once
    frequency_penalty: float = 0.0  # and subtracted once for each time
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added)
    seed: int | None = None  # all 64 bits count; answer i of n draws from a stream of its own
    n: int = 1  # answers to the one prompt
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # the stop string stays in the text
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: GrammarSpec | None = None  # where it ends, the answer does, whatever the above say
    logprobs: int | None = None  # of each generated token, with this many of the most likely
    prompt_logprobs: int | None = None  # the same of each prompt token but the first
    expert_density: float | None = None
    """Share of each layer's experts that the prompt keeps for the answer; None: tokens choose.

    Where the model has neurons to choose from (`SelectionStats`), the same share of those."""

    def __post_init__(self) -> None:
        for name, holds, rule in (*self._counts(), *self._weights()):
            if not holds:
                raise BadParameter(f"{name} must be {rule}, not {getattr(self, name)!r}", name)

    def _counts(self) -> tuple[tuple[str, bool, str], ...]:
        seed = self.seed is None or -(2**63) <= self.seed < 2**64
        least, most = 1 if self.n > 1 else 0, self.max_tokens
        return (
            ("max_tokens", self.max_tokens >= least, f"at least {least}"),
            ("min_tokens", 0 <= self.min_tokens <= most, f"between 0 and max_tokens ({most})"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("n", self.n >= 1, "at least 1"),
            ("seed", seed, "a whole number of 64 bits"),
            ("stop", all(self.stop), "free of empty strings"),
            ("logprobs", _is_count(self.logprobs), f"between 0 and {MOST_LOGPROBS}"),
            ("prompt_logprobs", _is_count(self.prompt_logprobs), f"between 0 and {MOST_LOGPROBS}"),
        )

    def _weights(self) -> tuple[tuple[str, bool, str], ...]:
        penalty = f"between -{MOST_PENALTY:.0f} and {MOST_PENALTY:.0f}"
        density = self.expert_density
        bias = all(abs(value) <= MOST_BIAS for _, value in self.logit_bias)
        return (
            ("temperature", 0.0 <= self.temperature <= 2.0, "between 0 and 2"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", abs(self.presence_penalty) <= MOST_PENALTY, penalty),
            ("frequency_penalty", abs(self.frequency_penalty) <= MOST_PENALTY, penalty),
            ("expert_density", density is None or 0.0 < density <= 1.0, "above 0 and at most 1"),
            ("logit_bias", bias, f"between -{MOST_BIAS:.0f} and {MOST_BIAS:.0f}"),
        )

    @property
    def scores_prompt(self) -> bool:
        return self.prompt_logprobs is not None


def _is_count(value: int | None) -> bool:
    return value is None or 0 <= value <= MOST_LOGPROBS
