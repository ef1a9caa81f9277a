"""Finds markers in text that arrives in pieces. What they mean is decided elsewhere."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Part(NamedTuple):
    """A marker, or text between two of them."""

    text: str
    is_marker: bool


class _MarkerSet:
    """What a search needs to know of a set of markers."""

    def __init__(self, markers: frozenset[str]) -> None:
        self.markers = markers
        self.lengths_chars = sorted({len(marker) for marker in markers}, reverse=True)
        self.beginnings = {marker[:n] for marker in markers for n in range(1, len(marker))}
        first = "".join(re.escape(char) for char in sorted({marker[0] for marker in markers}))
        self.first = re.compile(f"[{first}]" if first else r"(?!)")

    def at(self, text: str, start: int) -> str:
        """The longest marker that stands at `start`, or nothing."""
        ends = (start + n for n in self.lengths_chars if start + n <= len(text))
        return next((text[start:end] for end in ends if text[start:end] in self.markers), "")

    def may_begin(self, text: str, start: int) -> bool:
        """Whether the text from `start` on could still become a (longer) marker."""
        longest_chars = self.lengths_chars[0]
        return len(text) - start < longest_chars and text[start:] in self.beginnings


# A tokenizer may have a thousand special tokens, and a server has one tokenizer.
@lru_cache(maxsize=16)
def _marker_set(markers: frozenset[str]) -> _MarkerSet:
    return _MarkerSet(markers)


class MarkerCutter:
    """Cuts text into markers and the text between, the same however the text is split.

    Where several markers begin at the same place, the longest counts. Each push looks only at the
    new text and at what was held back, which is shorter than the longest marker.
    """

    def __init__(self, markers: frozenset[str]) -> None:
        self._set = _marker_set(markers - {""})
        self._held = ""

    def push(self, text: str) -> Iterator[Part]:
        text = self._held + text
        done, self._held = 0, ""
        at = self._set.first.search(text)
        while at:
            start = at.start()
            if self._set.may_begin(text, start):
                self._held, text = text[start:], text[:start]
                break
            marker = self._set.at(text, start)
            if marker:
                yield from _text(text[done:start])
                yield Part(marker, True)
                done = start + len(marker)
            at = self._set.first.search(text, done if marker else start + 1)
        yield from _text(text[done:])

    def finish(self) -> Iterator[Part]:
        """What was held back: no marker, or one that only a longer one kept waiting."""
        while self._held:
            text, self._held = self._held, ""
            marker = self._set.at(text, 0)
            yield Part(marker or text[0], bool(marker))
            yield from self.push(text[len(marker) or 1 :])


def _text(text: str) -> Iterator[Part]:
    if text:
        yield Part(text, False)
