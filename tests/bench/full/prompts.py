"""The same prompt as a file for runtimes that want text."""

from pathlib import Path

from tokenizers import Tokenizer

from .words import prompt_text


def write_prompt(out: Path, checkpoint: Path, tokens: int) -> Path:
    """A text of exactly `tokens` ids of the checkpoint's tokenizer."""
    text = prompt_text(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), tokens)
    out.write_text(text, "utf-8")
    return out
