"""What each token stands for, in bytes, as far as the tokenizer's decoder lets it be said alone.

Most decoders only join what their tokens stand for: byte-level ones, and SentencePiece's with or
without bytes as `<0xNN>`. For these a text is the join of its tokens' bytes, `joins_bytes` is True,
and a half character is known to be one. Others (WordPiece, suffixed BPE, patterns) look at a
token's neighbours: their text has to be decoded in windows.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

MOST_IDS = 2**32  # what the library can be asked for
_BESIDE = "a"  # a piece before the asked one, which is then not the first of the text
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class _Joining:
    """How a joining decoder spells a piece, and what it does to the first of a text."""

    byte_level: bool = False
    byte_fallback: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    first_without: str = ""  # the first piece loses all of these
    strips_space: bool = False  # the text loses one space at its start

    def bytes_of(self, piece: str) -> bytes:
        if self.byte_level:
            if all(char in _BYTE_OF for char in piece):
                return bytes(_BYTE_OF[char] for char in piece)
            return piece.encode("utf-8")
        for old, new in self.replaced:
            piece = piece.replace(old, new)
        byte = _BYTE.fullmatch(piece) if self.byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else piece.encode("utf-8")


class Vocabulary:
    """Thread safe: what it keeps can only be computed again to the same."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        added = fast.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(one for one, token in added.items() if token.special)
        self._parts = _flat_parts(fast.decoder)
        self._joining = _joining(self._parts)
        self._bytes: dict[int, bytes] = {}

    @property
    def added_ids(self) -> frozenset[int]:
        """Special ones too: what a model has been given beside its text, as `<think>`."""
        return frozenset(self._added)

    @property
    def joins_bytes(self) -> bool:
        return self._joining is not None

    @property
    def may_split_characters(self) -> bool:
        """Whether a token may be a part of a character."""
        return any(part["type"] in ("ByteLevel", "ByteFallback") for part in self._parts)

    def bytes_of(self, token_id: int) -> bytes:
        """Inside a text, not at its start. b"" for an id that the tokenizer does not have."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = self._piece(token_id)
            if piece is None:
                return b""
            found = self._bytes[token_id] = self._spelled(token_id, piece)
        return found

    def first_bytes_of(self, token_id: int) -> bytes:
        """At the start of a text; only where `joins_bytes`."""
        assert self._joining is not None
        piece = self._piece(token_id)
        if self._joining.first_without and piece is not None:
            return self._joining.bytes_of(piece.replace(self._joining.first_without, ""))
        inside = self.bytes_of(token_id)
        return inside.removeprefix(b" ") if self._joining.strips_space else inside

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def window(self, ids: Sequence[int]) -> str:
        """The library's own decoding of a few tokens, special ones like all others."""
        known = [token_id for token_id in ids if 0 <= token_id < MOST_IDS]
        return str(self._fast.decode(known, skip_special_tokens=False))

    def _piece(self, token_id: int) -> str | None:
        return self._fast.id_to_token(token_id) if 0 <= token_id < MOST_IDS else None

    def _spelled(self, token_id: int, piece: str) -> bytes:
        # added as text: what a text must have for it, not spelled as other pieces are
        added_as_text = self._joining is not None and self._joining.byte_level
        if token_id in self.special_ids or (added_as_text and token_id in self._added):
            return self._added[token_id].encode("utf-8")
        if self._joining is None:
            return self._between(piece).encode("utf-8")
        return self._joining.bytes_of(piece)

    def _between(self, piece: str) -> str:
        decoder = self._fast.decoder
        if decoder is None:
            return f" {piece}"
        before = decoder.decode([_BESIDE])
        return str(decoder.decode([_BESIDE, piece])[len(before) :])


def _joining(parts: list[dict[str, Any]]) -> _Joining | None:
    """None where a token's text hangs on more than being the first."""
    kinds = [part["type"] for part in parts]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _Joining(byte_level=True)
    # each kind once and in this order, but for replacements, of which there may be several
    order = ["Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"]
    places = [order.index(kind) if kind in order else -1 for kind in kinds]
    repeated = len(set(kinds)) + max(0, kinds.count("Replace") - 1) < len(kinds)
    if not parts or -1 in places or places != sorted(places) or repeated:
        return None
    if "Strip" in kinds and ("Fuse" not in kinds or "Metaspace" in kinds):
        return None  # it would strip every token, or what Metaspace left
    return _chained(parts)


def _chained(parts: list[dict[str, Any]]) -> _Joining | None:
    replaced: list[tuple[str, str]] = []
    first_without = ""
    for part in parts:
        if part["type"] == "Metaspace":
            replaced.append((part["replacement"], " "))
            first_without = part["replacement"] if part["prepend_scheme"] != "never" else ""
        elif part["type"] == "Replace":
            if not part["pattern"].get("String"):
                return None
            replaced.append((part["pattern"]["String"], part["content"]))
        elif part["type"] == "Strip" and (part["content"], part["start"], part["stop"]) != (
            *(" ", 1, 0),
        ):
            return None
    kinds = {part["type"] for part in parts}
    return _Joining(
        byte_fallback="ByteFallback" in kinds,
        replaced=tuple(replaced),
        first_without=first_without,
        strips_space="Strip" in kinds,
    )


def _flat_parts(decoder: Any) -> list[dict[str, Any]]:
    """A decoder as tokenizer.json has it, sequences flat."""
    return [] if decoder is None else _flat(json.loads(decoder.__getstate__()))


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    inner = part.get("decoders")
    return [part] if inner is None else [one for each in inner for one in _flat(each)]


def _byte_of() -> dict[str, int]:
    """GPT-2's spelling: printable bytes stand for themselves, the others begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_of()
