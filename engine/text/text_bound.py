"""How much text one token can stand for: what tells that a text is too long before it is encoded.

Only where a tokenizer surely drops nothing; None for all others.
"""

import json
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

COMPOSED_CHARS = 4  # no more characters become one when Unicode is composed
_COMPOSING = {"NFC", "NFKC"}
_SPLITTING = {"ByteLevel", "Digits", "Metaspace", "Split", "UnicodeScripts"}


def most_chars_per_token(fast: FastTokenizer) -> int | None:
    """A text of n characters has at least n divided by this many tokens."""
    model = fast.model
    if not isinstance(model, BPE) or (
        model.unk_token is not None and model.fuse_unk and not model.byte_fallback
    ):
        return None  # any number of unknown characters may be one token
    if any(part["type"] not in _SPLITTING or _removes(part) for part in _parts(fast.pre_tokenizer)):
        return None
    if any(token.lstrip or token.rstrip for token in fast.get_added_tokens_decoder().values()):
        return None  # any number of spaces may be part of one
    normalizers = _parts(fast.normalizer)
    if any(not _keeps_length(part) for part in normalizers):
        return None
    composed = COMPOSED_CHARS if any(part["type"] in _COMPOSING for part in normalizers) else 1
    # A byte-level token is spelled with a character a byte, so it is never shorter than its text.
    return composed * max(map(len, fast.get_vocab(with_added_tokens=True)))


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as tokenizer.json has it, sequences flat."""
    if component is None:
        return []
    found: dict[str, Any] = json.loads(component.__getstate__())
    return _flat(found)


def _flat(part: dict[str, Any]) -> list[dict[str, Any]]:
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else [one for each in inner for one in _flat(each)]


def _removes(part: dict[str, Any]) -> bool:
    return part.get("behavior") == "Removed"


def _keeps_length(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        replaced = part["pattern"].get("String")
        return replaced is not None and len(part["content"]) >= len(replaced)
    return part["type"] in {"Prepend", "Lowercase", "ByteLevel", "NFD", "NFKD", *_COMPOSING}
