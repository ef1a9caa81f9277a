"""Texts that a grammar allows, by walking at random through the tokens that it does not forbid."""

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np

from moestro.engine import GrammarSpec, Tokenizer

Validator = jsonschema.Draft202012Validator
PADDING = 5  # logits of a model that has more of them than its tokenizer has tokens
CLOSERS = (b'"', b"}", b"]")


def walk(
    tokenizer: Tokenizer, spec: GrammarSpec, seed: int = 0, most_tokens: int = 800
) -> list[int]:
    """Ids of one whole answer without its stop token. Closes what is open more often than not."""
    rng = np.random.default_rng(seed)
    constraint = tokenizer.grammars.compile(spec).constraint()
    size = tokenizers_size(tokenizer)
    closing = [token for token in range(size) if tokenizer.token_bytes(token) in CLOSERS]
    closing += tokenizer.stop_ids
    ids = list[int]()
    while len(ids) < most_tokens:
        logits = np.zeros(size + PADDING, np.float32)
        constraint.forbid(logits)
        allowed = np.flatnonzero(logits == 0)
        assert allowed[-1] < size, "a padded id has no text"
        closers = np.intersect1d(allowed, closing)
        token = int(rng.choice(closers if len(closers) and rng.random() < 0.3 else allowed))
        constraint.advance(token)
        if token in tokenizer.stop_ids:
            assert constraint.finished
            return ids
        ids.append(token)
        if constraint.finished:
            return ids
    raise AssertionError(f"no end after {most_tokens} tokens: {text_of(tokenizer, ids)!r}")


def tokenizers_size(tokenizer: Tokenizer) -> int:
    """One more than its largest id, for a tokenizer without gaps."""
    size = 0
    while tokenizer.token_bytes(size):
        size += 1
    return size


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """As an answer: behind a prompt."""
    (prompt, *_) = tokenizer.encode("a", add_special_tokens=False)
    stream = tokenizer.stream([prompt], ())
    return "".join(stream.push(token).text for token in ids) + stream.finish()


def check_valid(schema: Any, text: str) -> None:
    """Raises jsonschema.ValidationError, or json's own error."""
    Validator(schema, format_checker=Validator.FORMAT_CHECKER).validate(json.loads(text))
