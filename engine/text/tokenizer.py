"""Text to ids and back, with what a client may ask about either."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from moestro.engine.facts import BadParameter, ModelRefused, PromptTooLong
from moestro.engine.gguf_files import GgufSource
from moestro.engine.weights import gguf_source, json_object, warn_disagreement

from .chat_template import ChatTemplate, TemplateFacts
from .grammar import Grammars
from .prompt_slices import doubled_tokens, token_slices
from .reader import reader
from .text_bound import most_chars_per_token
from .text_stream import TextStream
from .tokenizer_files import RefusingGguf, RefusingTokenizer, log_own_code, refuse_stand_ins
from .vocabulary import Vocabulary

log = logging.getLogger("moestro.engine")


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """What a client needs to know of a tokenizer; None for what it does not have."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | dict[str, str] | None  # by name, where there are several


class Tokenizer:
    """A model's tokenizer. Thread safe.

    Raises ModelRefused where the folder has none, ModelNotFound where a file of it is a link to
    nowhere.
    """

    def __init__(self, folder: Path) -> None:
        source = gguf_source(folder)
        slow = _of_folder(folder) if source is None else _of_gguf(source)
        self._fast: FastTokenizer = slow.backend_tokenizer
        # tokenizer.json may say how its maker cut and padded; a prompt is taken as it is
        self._fast.no_truncation()
        self._fast.no_padding()
        self._chars_per_token = most_chars_per_token(self._fast)
        self._vocabulary = Vocabulary(self._fast)
        self.info = TokenizerInfo(
            slow.bos_token, slow.eos_token, slow.pad_token, slow.chat_template
        )
        self.chat = ChatTemplate(slow)
        own = slow.eos_token_id
        self.stop_ids = frozenset(_stop_ids(folder, own) if source is None else source.stop_ids)
        if not self.stop_ids:
            log.warning("%s names no end-of-sequence token: only limits end an answer", folder)
        self.grammars = Grammars(self._fast, self._vocabulary, self.stop_ids)

    def encode(
        self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Text that begins with what the tokenizer would put before it (BOS) gets no second one.

        Other threads go on meanwhile, which they do not with the library's `encode`.

        Raises BadParameter for text that is not valid Unicode (lone surrogates), PromptTooLong
        for more than `most_tokens`: without encoding it where its length alone says so.
        """
        self._check_text(text, most_tokens)
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = list(encoding.ids)[doubled_tokens(encoding) :]
        if most_tokens is not None:
            _refuse_above(most_tokens, len(ids), str(len(ids)))
        return ids

    def encode_with_texts(
        self, text: str, most_tokens: int | None = None, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[str]]:
        """As `encode`, and the slice of `text` that each token stands for: joined they are `text`
        (unless it has no token at all). "" for added tokens, and for all but the last token of a
        character.
        """
        self._check_text(text, most_tokens)
        (encoding,) = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)
        doubled = doubled_tokens(encoding)
        ids = list(encoding.ids)[doubled:]
        if most_tokens is not None:
            _refuse_above(most_tokens, len(ids), str(len(ids)))
        return ids, token_slices(text, encoding)[doubled:]

    def texts(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> list[str]:
        """What each token adds to `decode` of them all; a character is its last token's."""
        reading = reader(self._vocabulary, (), skip_special_tokens)
        texts = ["".join(part.text for part in reading.push(token) if part.shown) for token in ids]
        rest = reading.close()
        return [*texts[:-1], texts[-1] + rest] if rest else texts

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are no character are U+FFFD; a half character at the end is nothing yet."""
        return "".join(self.texts(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for inside a text; b"" for an id without a token."""
        return self._vocabulary.bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        """As `token_bytes`; those that are no text are written `bytes:\\xe2\\x80`."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def stream(
        self,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...],
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> TextStream:
        """The text that follows the prompt, and completes a character that the prompt begins."""
        reading = reader(self._vocabulary, prompt_ids, skip_special_tokens)
        return TextStream(reading, stop, include_stop)

    @property
    def num_ids(self) -> int:
        """One more than the largest id; some below it may have no token."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """What the special tokens say where they are not skipped."""
        return frozenset(self.token_text(one) for one in self._vocabulary.special_ids)

    @property
    def template_text(self) -> str:
        return self.chat.template_text

    @property
    def template_facts(self) -> TemplateFacts:
        """Raises TemplateRefused where the model has no template."""
        return self.chat.facts

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        kwargs: dict[str, Any],
    ) -> str:
        """The text of a prompt, BOS included where the template writes it. As `chat.render`."""
        return self.chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
        )

    def _check_text(self, text: str, most_tokens: int | None) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadParameter("the prompt is not valid Unicode text", "prompt") from error
        if most_tokens is not None and self._chars_per_token is not None:
            least_tokens = -(-len(text) // self._chars_per_token)
            _refuse_above(most_tokens, least_tokens, f"at least {least_tokens}")


def _of_folder(folder: Path) -> Any:
    """transformers' tokenizer. Raises ModelRefused or ModelNotFound."""
    refuse_stand_ins(folder)
    with RefusingTokenizer(folder):
        found: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        found.backend_tokenizer  # noqa: B018  # a class without one is refused here
    log_own_code(folder)
    return found


def _of_gguf(source: GgufSource) -> Any:
    """Out of the file, chat template included. Raises ModelRefused."""
    with RefusingGguf(source.paths[0]):
        return source.tokenizer()


def _refuse_above(most_tokens: int, tokens: int, in_words: str) -> None:
    if tokens > most_tokens:
        raise PromptTooLong.for_context(most_tokens, f"the prompt has {in_words} tokens")


def _stop_ids(folder: Path, own: int | list[int] | None) -> list[int]:
    """End-of-sequence ids: the tokenizer's, and those of the generation config or the config."""
    found = _ids(own)
    generation = json_object(folder / "generation_config.json", "a generation config")
    config = json_object(folder / "config.json", "a config")
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else {}
    said = [source.get("eos_token_id") for source in (generation, config, inner)]
    if said[0] is None and None not in said[1:] and said[1] != said[2]:
        warn_disagreement(folder, "eos_token_id", said[1], said[2], said[1])
    for source in (generation, config, inner):
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
