"""A tokenizer with more ids than the embedding has rows: served, and said once at the start."""

import json
import logging
from pathlib import Path

import pytest

import tiny
from engine_kit import generate, opened
from moestro.engine import BadParameter, GrammarSpec, SamplingParams


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("whole") / "model")


def add_tokens(folder: Path, count: int) -> None:
    """To a vocabulary of 260, as many as the embedding has rows."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": 260 + number, "content": f"<extra{number}>", "special": True, **flags}
        for number in range(count)
    ]
    path.write_text(json.dumps(tokenizer))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [line for line in lines if "embedding" in line]


def test_more_ids_than_rows(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_tokens(whole, 3)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    in_digits = SamplingParams(max_tokens=4, grammar=GrammarSpec("regex", "[0-9]{4}"))
    with opened(whole, tmp_path / "cache") as loaded:
        assert len(generate(loaded.engine, [[5, 6, 7]], params)[0].ids) == 4
        assert generate(loaded.engine, [[5, 6, 7]], in_digits)[0].text.isdigit()
        beyond = loaded.tokenizer.encode("a<extra2>")
        assert beyond[-1] == 262
        with pytest.raises(BadParameter, match=r"token ids outside 0\.\.259"):
            loaded.engine.validate(beyond, params)
    assert said(caplog) == [
        "the tokenizer has token ids up to 262, and the embedding 260 rows: prompts with ids from"
        " 260 on are refused"
    ]


def test_as_many_or_fewer_are_usual(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.build("mixtral", tmp_path / "model")
    with opened(folder, tmp_path / "cache"):
        pass
    assert not said(caplog)
