"""Token events as the completions API says them. Whole answers are the sum of their chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moestro.engine import FinishReason, TokenEvent, TokenLogprob
from moestro.server.api import Entry, Head, TokenLog, by_id, legacy, prompt_entries
from moestro.server.contract import Tokens

from .completion_schema import CompletionRequest

REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt. `texts` of its tokens, where somebody will see them."""

    ids: list[int]
    texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Answer:
    """What is out of one answer."""

    log: TokenLog = field(default_factory=TokenLog)
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    entries_chars: int = 0  # of their texts: less than `text` while a part of a token is held back
    reason: FinishReason | None = None
    begun: bool = False
    generated_logprob: float = 0.0
    generated_tokens: int = 0

    @property
    def mean_logprob(self) -> float:
        return self.generated_logprob / max(self.generated_tokens, 1)


@dataclass(frozen=True, slots=True)
class _News:
    """What an event adds to an answer."""

    text: str
    entries: list[Entry]
    offset_chars: int  # of the first entry
    is_first: bool


class CompletionReply:
    """Choice number = prompt * n + answer."""

    def __init__(
        self, head: Head, body: CompletionRequest, prompts: Sequence[Encoded], tokens: Tokens
    ) -> None:
        self._head = head
        self._body = body
        self._prompts = prompts
        self._tokens = tokens
        self._scores: list[list[TokenLogprob]] = [[] for _ in prompts]
        self._answers = {
            (prompt, index): _Answer()
            for prompt in range(len(prompts))
            for index in range(body.candidates)
        }

    def take(self, prompt: int, event: TokenEvent) -> list[dict[str, Any]]:
        """At most one choice, and none without news."""
        news = self.add(prompt, event)
        if not (news.text or news.entries or event.finish_reason):
            return []
        choice = self._choice(prompt, event.index, news.text, news.entries, news.offset_chars)
        choice["finish_reason"] = REASONS[event.finish_reason] if event.finish_reason else None
        return [choice | self._prompt_scores(prompt, wanted=news.is_first)]

    def add(self, prompt: int, event: TokenEvent) -> _News:
        self._scores[prompt] += event.prompt_logprobs
        answer = self._answers[prompt, event.index]
        text, entries = event.text, answer.log.push(event)
        answer.generated_tokens += len(event.token_ids)
        answer.generated_logprob += sum(score.logprob for score in event.logprobs)
        if not answer.begun and self._body.echo:
            echoed = self._prompts[prompt].texts
            text = "".join(echoed) + text
            entries = self._echoed(prompt) + entries
        answer.text += text
        answer.entries += entries
        offset_chars = answer.entries_chars
        answer.entries_chars += sum(len(entry.text) for entry in entries)
        answer.reason = event.finish_reason
        first, answer.begun = not answer.begun, True
        return _News(text, entries, offset_chars, first)

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head.fields(), "object": "text_completion", "choices": choices}

    def whole(self) -> dict[str, Any]:
        choices = []
        for prompt in range(len(self._prompts)):
            for place, index in enumerate(self._best(prompt)):
                answer = self._answers[prompt, index]
                choice = self._choice(prompt, place, answer.text, answer.entries, 0)
                choice["finish_reason"] = REASONS[answer.reason] if answer.reason else None
                choices.append(choice | self._prompt_scores(prompt, wanted=True))
        return self.chunk(choices)

    def _best(self, prompt: int) -> list[int]:
        """All answers in order; or of more than are wanted those with the likeliest tokens."""
        everyone = list(range(self._body.candidates))
        if self._body.candidates > self._body.answers:
            everyone.sort(key=lambda index: -self._answers[prompt, index].mean_logprob)
        return everyone[: self._body.answers]

    def _choice(
        self, prompt: int, index: int, text: str, entries: list[Entry], offset_chars: int
    ) -> dict[str, Any]:
        shown = self._body.logprobs is not None
        logprobs = legacy(entries, offset_chars, self._tokens.token_text) if shown else None
        number = prompt * self._body.answers + index
        return {"index": number, "text": text, "logprobs": logprobs}

    def _echoed(self, prompt: int) -> list[Entry]:
        if self._body.logprobs is None:
            return []
        told = self._prompts[prompt]
        scores = [_shortened(score, self._body.logprobs) for score in self._scores[prompt]]
        return prompt_entries(told.texts, told.ids, scores)

    def _prompt_scores(self, prompt: int, *, wanted: bool) -> dict[str, Any]:
        count = self._body.prompt_logprobs
        if count is None or not wanted:
            return {}
        ids = self._prompts[prompt].ids
        scores = [_shortened(score, count) for score in self._scores[prompt]]
        entries = prompt_entries([""] * len(ids), ids, scores)
        return {"prompt_logprobs": by_id(entries, self._tokens.token_text)}


def _shortened(score: TokenLogprob, count: int) -> TokenLogprob:
    """With so many likely tokens; more were asked for by another field."""
    return TokenLogprob(score.token_id, score.logprob, score.top[:count])
