"""Log probabilities beside the text: which token stands for which characters.

A token may be part of a character, and text may be held back or cut where a stop string begins. So
entries wait until their text is let out, and the texts of all entries together are the answer's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moestro.engine import TokenEvent, TokenLogprob

IMPOSSIBLE = -9999.0  # instead of minus infinity, which is no JSON


@dataclass(frozen=True, slots=True)
class Entry:
    """One token. `score` is None for the first of a prompt, which nothing predicts."""

    text: str
    token_id: int
    score: TokenLogprob | None


class TokenLog:
    """Of one answer."""

    def __init__(self) -> None:
        self._held: list[Entry] = []
        self._let_out_chars = 0
        self._told_chars = 0  # of the entries that are out

    def push(self, event: TokenEvent) -> list[Entry]:
        """Entries whose text is out by now; with the last event all, cut where the text is."""
        self._let_out_chars += len(event.text)
        if event.logprobs:
            pairs = zip(event.token_texts, event.logprobs, strict=True)
            self._held += [Entry(text, score.token_id, score) for text, score in pairs]
        out = []
        while self._held and (event.finish_reason is not None or self._is_out(self._held[0])):
            entry = self._held.pop(0)
            text = entry.text[: self._let_out_chars - self._told_chars]
            self._told_chars += len(text)
            out.append(replace(entry, text=text))
        return out

    def _is_out(self, entry: Entry) -> bool:
        return self._told_chars + len(entry.text) <= self._let_out_chars


def prompt_entries(
    texts: Sequence[str], ids: Sequence[int], scores: Sequence[TokenLogprob]
) -> list[Entry]:
    """`scores` are of the second token and on."""
    return [
        Entry(text, token, score)
        for text, token, score in zip(texts, ids, [None, *scores], strict=True)
    ]


def number(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


def legacy(
    entries: Sequence[Entry], offset_chars: int, text_of: Callable[[int], str]
) -> dict[str, Any]:
    """The four lists of the completions API. `text_of`: one token by itself."""
    offsets = []
    for entry in entries:
        offsets.append(offset_chars)
        offset_chars += len(entry.text)
    scores = [entry.score for entry in entries]
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [None if score is None else number(score.logprob) for score in scores],
        "top_logprobs": [
            None if entry.score is None else _top(entry.text, entry.score, text_of)
            for entry in entries
        ],
        "text_offset": offsets,
    }


def _top(text: str, score: TokenLogprob, text_of: Callable[[int], str]) -> dict[str, float]:
    """The chosen one is in it, under the text that it has here. Of equal texts the likelier."""
    found: dict[str, float] = {}
    for token, logprob in ((score.token_id, score.logprob), *score.top):
        name = text if token == score.token_id and text else text_of(token)
        found[name] = max(number(logprob), found.get(name, IMPOSSIBLE))
    return found


def openai_chat(
    entries: Sequence[Entry], bytes_of: Callable[[int], bytes], text_of: Callable[[int], str]
) -> list[dict[str, Any]]:
    """The `content` list of the chat API."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = list(bytes_of(token))
        return {"token": text_of(token), "logprob": number(logprob), "bytes": raw}

    return [
        {
            **one(entry.token_id, entry.score.logprob),
            "top_logprobs": [one(token, logprob) for token, logprob in entry.score.top],
        }
        for entry in entries
        if entry.score is not None
    ]


def by_id(entries: Sequence[Entry], text_of: Callable[[int], str]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id."""
    return [
        None
        if entry.score is None
        else {
            str(token): {"logprob": number(logprob), "decoded_token": text_of(token)}
            for token, logprob in (*entry.score.top, (entry.token_id, entry.score.logprob))
        }
        for entry in entries
    ]
