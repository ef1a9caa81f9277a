"""A tokenizer as llguidance wants it: the bytes of each token, and how a text is spelled in them.

Added tokens (`<|im_end|>`, `<think>`) are markers, not text: no grammar may choose them, but for
the stop tokens, and these only where it may end.
"""

from collections.abc import Iterable

from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import Tokenizer as FastTokenizer

from moestro.engine.facts import GrammarRefused

from .vocabulary import Vocabulary

PRINTABLE = [bytes([byte]) for byte in range(0x20, 0x7F)]
MARK = "\x02"  # before a text, where a tokenizer puts a space; no word is merged with it
END = b"<end>"  # for a tokenizer without a stop token: no model can choose it


class GrammarTokens:
    """Its public members are named as llguidance's `TokenizerWrapper` reads them. Thread safe."""

    def __init__(
        self, fast: FastTokenizer, vocabulary: Vocabulary, stop_ids: Iterable[int]
    ) -> None:
        """Raises GrammarRefused for a tokenizer that cannot spell ASCII byte by byte."""
        self._fast = fast
        self.count = max(fast.get_vocab(with_added_tokens=True).values()) + 1
        self.stop_ids = [token for token in sorted(stop_ids) if token < self.count]
        self._markers = vocabulary.added_ids.union(self.stop_ids)
        self.tokens = [vocabulary.bytes_of(token) for token in range(self.count)]
        self._ids = {
            data: token for token, data in enumerate(self.tokens) if token not in self._markers
        }
        if not vocabulary.joins_bytes or not all(one in self._ids for one in PRINTABLE):
            raise GrammarRefused(
                "this model's tokenizer has no token for each character of JSON, so its answers"
                " cannot be held to a grammar; ask without one"
            )
        self._longest_bytes = max(map(len, self._ids))
        self.bos_token_id = None
        self.special_token_ids = sorted(self._markers)
        if not self.stop_ids:
            self.stop_ids = [self.count]
            self.tokens.append(END)
            self.special_token_ids.append(self.count)
        self.eos_token_id = self.stop_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        """As the model has learned to spell it; where that is not known, by the longest tokens."""
        for mark in ("", MARK):
            ids = self._encoded(mark, text)
            if (
                self._markers.isdisjoint(ids)
                and b"".join(self.tokens[token] for token in ids) == text
            ):
                return ids
        return self._longest(text)

    def opened(self) -> LLTokenizer:
        """Takes about a second for a large vocabulary."""
        return LLTokenizer(TokenizerWrapper(self), eos_token=self.stop_ids)

    def id_of(self, character: bytes) -> int:
        """One of printable ASCII."""
        return self._ids[character]

    def _encoded(self, mark: str, text: bytes) -> list[int]:
        """[] where it cannot be said which tokens are the text's."""
        try:
            whole = mark + text.decode("utf-8")
        except UnicodeDecodeError:
            return []
        (encoding,) = self._fast.encode_batch_fast([whole], add_special_tokens=False)
        ids = list(encoding.ids)
        places = [place for place, token in enumerate(ids) if self.tokens[token] == mark.encode()]
        start = places[0] + 1 if mark and places else 0
        return ids[start:]

    def _longest(self, text: bytes) -> list[int]:
        ids, start = list[int](), 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest_bytes), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:  # llguidance finds that nothing can follow
                break
            ids.append(self._ids[text[start:end]])
            start = end
        return ids
