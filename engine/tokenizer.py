"""Text to ids and back, one token at a time, never half a character or part of a stop string."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig

from .errors import BadParameter, ModelRefused

CONTEXT_TOKENS = 8  # tokens of the prompt that tell the decoder how the first new one joins on


class Tokenizer:
    """A model's tokenizer. Thread safe. Raises ModelRefused where the folder has none."""

    def __init__(self, folder: Path) -> None:
        try:
            self._slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._fast: FastTokenizer = self._slow.backend_tokenizer
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ModelRefused(f"{folder} has no tokenizer that can be read: {error}") from error
        self.stop_ids = frozenset(_stop_ids(folder, self._slow.eos_token_id))

    def encode(self, text: str) -> list[int]:
        """Raises BadParameter for text that is not valid Unicode (lone surrogates)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadParameter("the prompt is not valid Unicode text", "prompt") from error
        return list(self._fast.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> "TextStream":
        return TextStream(self._fast, prompt_ids, stop)


class TextStream:
    """The text of one sequence as it grows.

    `push` returns what may be sent. Text that could still become a stop string is held back;
    after a stop string has come, `stopped` is True and nothing follows.
    """

    def __init__(
        self, tokenizer: FastTokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(
            ids=list(prompt_ids)[-CONTEXT_TOKENS:], skip_special_tokens=True
        )
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        text = self._decoder.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._risky_tail())

    def finish(self) -> str:
        """What was held back and can no longer become a stop string."""
        return "" if self.stopped else self._release(len(self._held))

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


def _stop_ids(folder: Path, eos: int | list[int] | None) -> list[int]:
    """End-of-sequence ids of the tokenizer and of the generation config, where there is one."""
    found = [eos] if isinstance(eos, int) else list(eos or [])
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        more = config.eos_token_id
        found += [more] if isinstance(more, int) else list(more or [])
    return found
