"""Clients see a name, never a commit's hash or the dots of a path."""

from pathlib import Path

import pytest

from moestro.server.facts import Settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot(root: Path, repository: str) -> Path:
    folder = root / "hub" / repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def name_of(folder: object) -> str:
    return Settings(model=str(folder)).served_name


@pytest.mark.parametrize(
    "file", ["Tiny-A3B-Q4_K_M.gguf", "Tiny-A3B-Q4_K_M-00001-of-00002.gguf", "Tiny-A3B-Q4_K_M.GGUF"]
)
def test_a_gguf_file_is_named_by_its_stem(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"GGUF")
    assert name_of(tmp_path / file) == "Tiny-A3B-Q4_K_M"


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("models--org--name-8x7B", "org/name-8x7B"),
        ("models--gpt2", "gpt2"),
        ("models--org--odd--name", "org/odd--name"),
    ],
)
def test_a_snapshot_is_named_as_in_the_hub(repository: str, name: str, tmp_path: Path) -> None:
    assert name_of(snapshot(tmp_path, repository)) == name
    assert name_of(f"{tmp_path}/hub/{repository}/snapshots/{COMMIT}/") == name


def test_dots_are_the_folder_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "inner")
    assert name_of(".") == "inner"
    assert name_of("..") == "mine"
    assert name_of(tmp_path / "mine" / "inner" / "..") == "mine"
    assert name_of("../../mine") == "mine"


def test_dots_in_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(tmp_path, "models--org--name")
    monkeypatch.chdir(folder)
    assert name_of(".") == "org/name"
    assert name_of(f"../{COMMIT}") == "org/name"
    (folder / "onnx").mkdir()
    monkeypatch.chdir(folder / "onnx")
    assert name_of("..") == "org/name"


def test_a_link_has_the_name_that_it_was_given(tmp_path: Path) -> None:
    link = tmp_path / "my-model"
    link.symlink_to(snapshot(tmp_path, "models--org--name"))
    assert name_of(link) == "my-model"


def test_only_the_hubs_layout_is_the_hubs(tmp_path: Path) -> None:
    folder = tmp_path / "backup" / "snapshots" / "today"
    folder.mkdir(parents=True)
    assert name_of(folder) == "today"


def test_a_given_name_stays_above_it(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "models--org--name")
    assert Settings(model=str(folder), served_model_name="x").served_name == "x"
