"""Ids in, text out, token by token, never half a character. Knows no stop strings.

A half character at the end of a text is no text yet: it gives nothing. Bytes that can no longer
become a character give U+FFFD at once, and so does a half one that a special token cuts off.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .vocabulary import Vocabulary

BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)
CONTEXT_TOKENS = 8  # that tell a decoder how the next one joins on
MOST_CHARACTER_BYTES = 4


class Characters:
    """Bytes in, characters out; keeps the start of one for as long as it can become one."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def begun(self) -> bytes:
        return self._decoder.getstate()[0]

    def push(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        begun = self.begun
        # the codec waits for the rest of a surrogate, which is no character either
        if len(begun) == 2 and begun[0] == 0xED and begun[1] >= 0xA0:
            text += self.cut()
        return text

    def cut(self) -> str:
        """No more bytes come for what is begun."""
        return self._decoder.decode(b"", True)


class Part(NamedTuple):
    """A piece of text; not `shown` if it is a special token's and these are skipped."""

    text: str
    shown: bool


class Reader(Protocol):
    def push(self, token_id: int) -> list[Part]: ...
    def close(self) -> str:
        """What text remains when no token follows."""


def reader(vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Reader:
    """Reads what follows the prompt; a character that the prompt begins belongs to what follows."""
    kind = ByteReader if vocabulary.joins_bytes else WindowReader
    return kind(vocabulary, prompt_ids, skip_special_tokens)


class ByteReader:
    """For tokenizers whose text is the join of their tokens' bytes."""

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._started = any(
            token not in self._hidden and vocabulary.bytes_of(token) for token in prompt_ids
        )
        self._characters = Characters()
        self._characters.push(self._last_bytes(prompt_ids))
        self._of_prompt = self._characters.begun

    def push(self, token_id: int) -> list[Part]:
        if token_id in self._vocabulary.special_ids:
            return self._push_special(token_id)
        data = self._vocabulary.bytes_of(token_id)
        if data and not self._started:
            data, self._started = self._vocabulary.first_bytes_of(token_id), True
        if data and self._of_prompt:
            self._join_prompt(data)
        return [Part(self._characters.push(data), True)]

    def close(self) -> str:
        return ""

    def _push_special(self, token_id: int) -> list[Part]:
        broken = self._characters.cut()
        if self._of_prompt:
            broken, self._of_prompt = "", b""
        shown = token_id not in self._hidden
        self._started = self._started or shown
        return [Part(broken, True), Part(self._vocabulary.text_of(token_id), shown)]

    def _join_prompt(self, data: bytes) -> None:
        """Bytes of the prompt that do not become a character now are the prompt's fault."""
        first = data[:1]
        if Characters().push(self._of_prompt + first) == BROKEN + Characters().push(first):
            self._characters.cut()
        self._of_prompt = b""

    def _last_bytes(self, ids: Sequence[int]) -> bytes:
        """At least as many as can be a half character, if there are so many."""
        found = b""
        for token in reversed(ids):
            if token in self._vocabulary.special_ids or len(found) >= MOST_CHARACTER_BYTES - 1:
                break
            found = self._vocabulary.bytes_of(token) + found
        return found


class WindowReader:
    """For all others: decodes [seen tokens | new tokens]; the new text is what that has beyond the
    seen part. Where a token may be a part of a character, a window that ends in a broken one waits
    for as many tokens as a character may have.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._seen: list[int] = []
        for token in reversed(prompt_ids):
            if len(self._seen) == CONTEXT_TOKENS:
                break
            if token not in self._hidden:
                self._seen.insert(0, token)
        self._new: list[int] = []
        self._most_new = MOST_CHARACTER_BYTES if vocabulary.may_split_characters else 1

    def push(self, token_id: int) -> list[Part]:
        if token_id in self._hidden:
            return [Part(self._vocabulary.text_of(token_id), False)]
        self._new.append(token_id)
        text = self._beyond()
        if text.endswith(BROKEN) and len(self._new) < self._most_new:
            return []
        self._seen, self._new = [*self._seen, *self._new][-CONTEXT_TOKENS:], []
        return [Part(text, True)]

    def close(self) -> str:
        return self._beyond().rstrip(BROKEN) if self._new else ""

    def _beyond(self) -> str:
        before = self._vocabulary.window(self._seen)
        return self._vocabulary.window([*self._seen, *self._new])[len(before) :]
