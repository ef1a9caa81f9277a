"""Of what a config says twice and not the same, that counts which counts in stock transformers."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tiny_families
from moestro.engine import Tokenizer
from moestro.engine.model.meta_model import build_meta_model
from moestro.engine.weights import Checkpoint

# The whole's own class has the head of one, the text half's class that of the other.
CLASSES: dict[str, Any] = {
    "qwen3_vl_moe": hf.AutoModelForImageTextToText,
    "qwen3_5_moe": hf.AutoModelForCausalLM,
}


@pytest.fixture(scope="module", params=sorted(CLASSES))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.build(request.param, tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(folder: Path, outer: dict[str, object], inner: dict[str, object]) -> str:
    """The model's type."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= inner
    path.write_text(json.dumps(config | outer))
    return str(config["model_type"])


def stock(kind: str, folder: Path) -> Any:
    with torch.device("meta"):
        return CLASSES[kind].from_config(hf.AutoConfig.from_pretrained(folder))


def understood(folder: Path) -> Any:
    checkpoint = Checkpoint(folder)
    model = build_meta_model(checkpoint, torch.float32)
    checkpoint.split_keys(model)
    return model


def said(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [line for line in lines if f"config.json has {name}" in line]


@pytest.mark.parametrize("outer", [False, True])
def test_two_words_on_tied_weights(
    outer: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind = edit(folder, {"tie_word_embeddings": outer}, {"tie_word_embeddings": not outer})
    wanted = bool(stock(kind, folder).all_tied_weights_keys)
    understood(folder)
    assert said(caplog, "tie_word_embeddings") == [
        f"{folder}: config.json has tie_word_embeddings {outer}, and in its text_config"
        f" {not outer}; {wanted} counts, as in transformers"
    ]


def test_two_sizes_of_the_vocabulary(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = edit(folder, {"vocab_size": 99}, {})
    wanted = stock(kind, folder).get_input_embeddings().weight.shape[0]
    assert wanted != 99
    found = understood(folder)
    assert found.get_input_embeddings().weight.shape[0] == wanted
    assert said(caplog, "vocab_size") == [
        f"{folder}: config.json has vocab_size 99, and in its text_config {wanted}; {wanted}"
        " counts, as in transformers"
    ]


def test_two_ends_of_sequence(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder, {"eos_token_id": 7}, {"eos_token_id": 8})
    wanted = hf.GenerationConfig.from_model_config(hf.AutoConfig.from_pretrained(folder))
    assert wanted.eos_token_id == 7
    assert Tokenizer(folder).stop_ids - {256} == {7}
    assert len(said(caplog, "eos_token_id 7, and in its text_config 8; 7 counts")) == 1


def test_a_generation_config_settles_the_end(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    edit(folder, {"eos_token_id": 7}, {"eos_token_id": 8})
    assert Tokenizer(folder).stop_ids - {256} == {9}
    assert not said(caplog, "eos_token_id")


def test_who_says_it_once_or_the_same_is_not_warned(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder, {"tie_word_embeddings": False}, {"tie_word_embeddings": False})
    understood(folder)
    Tokenizer(folder)
    assert not said(caplog, "")
