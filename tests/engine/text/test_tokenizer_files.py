"""Files of a tokenizer that are something else are named before, and after, a library stumbles."""

import json
import shutil
from pathlib import Path

import pytest

import tiny
from moestro.engine import ModelNotFound, ModelRefused, Tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "9.0"}, "Unknown tokenizer version '9.0'"),
        ({"pre_tokenizer": {"type": "FromTheFuture"}}, "did not match any variant"),
        ({"model": {"type": "FromTheFuture"}}, "did not match any variant"),
    ],
)
def test_a_tokenizer_of_a_newer_library_is_refused(
    changes: dict[str, object], words: str, folder: Path
) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelRefused, match="is not one that tokenizers ") as caught:
        Tokenizer(folder)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_somebody_elses_error_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(folder)


def test_what_would_not_be_read_is_not_looked_at(folder: Path) -> None:
    (folder / "tokenizer.model").write_text("<html>")
    (folder / "merges.txt").symlink_to("nowhere")
    Tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "tekken.json"])
def test_without_a_tokenizer_json_the_others_are(name: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / name).write_text("<html>")
    with pytest.raises(ModelRefused, match=f"{name} is a web page"):
        Tokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    with pytest.raises(ModelNotFound, match=f"{name} is a link to nowhere"):
        Tokenizer(folder)
