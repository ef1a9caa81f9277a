"""Text to ids and back, one token at a time, never half a character or part of a stop string."""

import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from moestro.engine.facts import BadParameter, ModelRefused, PromptTooLong
from moestro.engine.weights import json_object

from .text_bound import most_chars_per_token

log = logging.getLogger("moestro.engine")

CONTEXT_TOKENS = 8  # tokens of the prompt that tell the decoder how the first new one joins on
BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)
MOST_HELD_TOKENS = 16  # no character is longer; what is still broken then stays broken


class Tokenizer:
    """A model's tokenizer. Thread safe. Raises ModelRefused where the folder has none."""

    def __init__(self, folder: Path) -> None:
        try:
            slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._fast: FastTokenizer = slow.backend_tokenizer
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            words = " ".join(str(error).split())
            raise ModelRefused(
                f"{folder} has no tokenizer that can be read: {words}; fetch tokenizer.json and"
                " tokenizer_config.json again"
            ) from error
        # tokenizer.json may say how its maker cut and padded; a prompt is taken as it is
        self._fast.no_truncation()
        self._fast.no_padding()
        self._chars_per_token = most_chars_per_token(self._fast)
        self.stop_ids = frozenset(_stop_ids(folder, slow.eos_token_id))
        if not self.stop_ids:
            log.warning("%s names no end-of-sequence token: only limits end an answer", folder)

    def encode(self, text: str, most_tokens: int | None = None) -> list[int]:
        """Other threads go on meanwhile, which they do not with the library's `encode`.

        Raises BadParameter for text that is not valid Unicode (lone surrogates), PromptTooLong
        for more than `most_tokens`: without encoding it where its length alone says so.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadParameter("the prompt is not valid Unicode text", "prompt") from error
        if most_tokens is not None and self._chars_per_token is not None:
            least_tokens = -(-len(text) // self._chars_per_token)
            _refuse_above(most_tokens, least_tokens, f"at least {least_tokens}")
        (encoding,) = self._fast.encode_batch_fast([text])
        if most_tokens is not None:
            _refuse_above(most_tokens, len(encoding), str(len(encoding)))
        return list(encoding.ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> "TextStream":
        return TextStream(self, prompt_ids, stop)


class TextStream:
    """The text of one sequence as it grows.

    `push` returns what may be sent. Text that could still become a stop string is held back;
    after a stop string has come, `stopped` is True and nothing follows.

    A token's text depends on its neighbours, so a window is decoded: [seen tokens | new tokens].
    The new text is what the whole window has beyond the seen part. While it ends in a broken
    character the new tokens wait for more.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._seen = list(prompt_ids)[-CONTEXT_TOKENS:]
        self._new: list[int] = []
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._window()
        if text.endswith(BROKEN) and len(self._new) < MOST_HELD_TOKENS:
            return ""
        self._seen, self._new = self._new, []
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._risky_tail())

    def finish(self) -> str:
        """What was held back and can no longer become a stop string or a whole character."""
        if self.stopped:
            return ""
        if self._new:
            self._held += self._window().rstrip(BROKEN)
        return self._release(len(self._held))

    def _window(self) -> str:
        before = self._tokenizer.decode(self._seen)
        return self._tokenizer.decode(self._seen + self._new)[len(before) :]

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _risky_tail(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _refuse_above(most_tokens: int, tokens: int, in_words: str) -> None:
    if tokens > most_tokens:
        raise PromptTooLong.for_context(most_tokens, f"the prompt has {in_words} tokens")


def _stop_ids(folder: Path, own: int | list[int] | None) -> list[int]:
    """End-of-sequence ids: the tokenizer's, and those of the generation config or the config."""
    found = _ids(own)
    generation = json_object(folder / "generation_config.json", "a generation config")
    config = json_object(folder / "config.json", "a config")
    text_config = config.get("text_config")
    for source in (generation, config, text_config if isinstance(text_config, dict) else {}):
        if source.get("eos_token_id") is not None:
            return found + _ids(source["eos_token_id"])
    return found


def _ids(value: object) -> list[int]:
    if value is None:
        return []
    given = value if isinstance(value, list) else [value]
    ids = [one for one in given if isinstance(one, int) and not isinstance(one, bool)]
    if len(ids) != len(given):
        raise ModelRefused(f"eos_token_id must be a token id or a list of them, not {value!r}")
    return ids
