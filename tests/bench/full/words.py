"""A byte-level BPE tokenizer of a given size that every runtime here can read.

Its 256 bytes make any text encodable; its merges are invented syllables, so that a prompt is not
one token per letter and every id decodes to printable text.
"""

import json
from itertools import product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|padding|>")
SPACE = "Ġ"  # how byte-level BPE writes a blank


def vocabulary(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens by id, and the merges that make those beyond the bytes."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if size < len(tokens):
        raise ValueError(f"a byte-level vocabulary has at least {len(tokens)} tokens, not {size}")
    pairs = [(a, b) for a, b in product(ascii_lowercase, repeat=2)]
    heads = [a + b for a, b in pairs]
    merges = pairs + [(SPACE, head) for head in heads]
    words = [SPACE + head for head in heads]
    merges += [(word, letter) for word, letter in product(words, ascii_lowercase)]
    merges += [(word, head) for word, head in product(words, heads)]
    merges = merges[: size - len(tokens)]
    return tokens + ["".join(merge) for merge in merges], merges


def write_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json and its config for a vocabulary of `size` ids."""
    tokens, merges = vocabulary(size)
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def prompt_text(tokenizer: Tokenizer, tokens: int) -> str:
    """Invented words that are exactly `tokens` ids long."""
    words = [
        first + second for first, second in product("bdfgklmnprst", "aeiou") for _ in range(64)
    ]
    text = ""
    for number in range(tokens):
        text += " " + words[(number * 37) % len(words)]
    ids = tokenizer.encode(text).ids[:tokens]
    text = tokenizer.decode(ids)
    found = len(tokenizer.encode(text).ids)
    if found != tokens:
        raise ValueError(f"the prompt has {found} tokens instead of {tokens}")
    return str(text)
