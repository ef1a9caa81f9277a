"""No code out of a checkpoint is run, and none is needed for the types that transformers has."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

import tiny
from engine_kit import opened, run_logits
from moestro.engine import ModelRefused, Tokenizer
from moestro.engine.weights import read_config

EVIL = """
import pathlib
pathlib.Path(__file__).with_name("was_run").touch()
raise SystemExit("code of a checkpoint was run")
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / "evil.py").write_text(EVIL)
    return folder


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers would copy code that it is going to run."""
    place = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))
    return place


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nothing_was_run(root: Path) -> bool:
    return not list(root.rglob("was_run")) and not list(root.rglob("modules/*"))


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_a_type_that_transformers_has_is_served_without_the_folders_code(
    folder: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP)
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    found = []
    caplog.set_level(logging.INFO, "moestro.engine")
    for place in (whole, folder):
        with opened(place, tmp_path / "cache") as loaded:
            found.append(run_logits(loaded, [[(1, [5, 6, 7])]])[0])
    assert torch.equal(*found)
    assert nothing_was_run(tmp_path)
    lines = [line for line in said(caplog, logging.INFO) if "auto_map" in line]
    assert lines == [
        f"{folder / 'config.json'}: auto_map is ignored and no code of the folder is run;"
        " transformers has the type 'mixtral' itself",
        f"{folder / 'tokenizer_config.json'}: auto_map is ignored and no code of the folder is run",
    ]


def test_nothing_that_is_built_from_the_config_can_look_for_code(folder: Path) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP)
    config: PreTrainedConfig = read_config(folder)
    assert not hasattr(config, "auto_map")


@pytest.mark.parametrize("kind", ["evil", None, ["mixtral"]])
def test_a_type_of_the_folders_own_is_refused(kind: object, folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", auto_map=AUTO_MAP, model_type=kind)
    with pytest.raises(ModelRefused) as caught:
        read_config(folder)
    assert f"(auto_map) for the type {kind!r}, which transformers" in str(caught.value)
    assert "moestro runs no code out of a checkpoint" in str(caught.value)
    assert "needs a release of transformers that knows the type" in str(caught.value)
    assert nothing_was_run(tmp_path)


@pytest.mark.parametrize("auto_map", [AUTO_MAP, {"AutoTokenizer": ["evil.Evil"]}, ["evil.Evil"]])
def test_a_tokenizer_of_the_folders_own_needs_a_tokenizer_json(
    auto_map: object, folder: Path, tmp_path: Path
) -> None:
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelRefused) as caught:
        Tokenizer(folder)
    assert "tokenizer_config.json wants code of its own (auto_map)" in str(caught.value)
    assert "'EvilTokenizer'" in str(caught.value)
    assert nothing_was_run(tmp_path)


def test_a_tokenizer_of_another_name_is_read_from_its_tokenizer_json(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    edit(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="EvilTokenizer")
    assert Tokenizer(folder).encode("Ärger") == Tokenizer(whole).encode("Ärger")
    assert nothing_was_run(tmp_path)
