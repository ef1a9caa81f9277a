"""Which words are a hub's name and which a folder's."""

import subprocess
import sys
from pathlib import Path

import pytest

from moestro.server.facts import HubName, Refused, Settings, load_settings
from moestro.server.facts.hub_name import hub_name


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("org/name", "org/name", None),
        ("Org-1/name_8x7B.v2", "Org-1/name_8x7B.v2", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("org/name@v1.0-rc+1", "org/name", "v1.0-rc+1"),
    ],
)
def test_names_of_a_hub(text: str, repo_id: str, revision: str | None) -> None:
    found = hub_name(text)
    assert found == HubName(repo_id, revision)
    assert str(found) == text


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "../org", "/org/name", "~/name", "a/b/c", "org/", "/", "a b/c"]
)
def test_other_forms_are_no_names(text: str) -> None:
    assert hub_name(text) is None


@pytest.mark.parametrize(
    "text", ["org/a--b", "org/na..me", "org/name.git", "org/" + 100 * "a", "org/name-"]
)
def test_names_that_the_hub_does_not_take(text: str) -> None:
    with pytest.raises(ValueError, match="is no name of a hub"):
        hub_name(text)


@pytest.mark.parametrize("revision", ["", "../../x", "a b", "/main", "-x"])
def test_revisions_that_are_none(revision: str) -> None:
    with pytest.raises(ValueError, match="is no branch, tag or commit"):
        hub_name(f"org/name@{revision}")


def test_a_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = Settings(model="org/name")
    assert (there.hub_name, there.served_name) == (HubName("org/name", None), "org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    here = Settings(model="org/name")
    assert (here.hub_name, here.served_name) == (None, "name")
    assert here.model_path == tmp_path / "org" / "name"


def test_a_model_of_a_hub_is_called_by_its_name_without_the_revision() -> None:
    assert Settings(model="org/name@v1").served_name == "org/name"
    assert Settings(model="org/name@v1", served_model_name="mine").served_name == "mine"
    assert Settings(model="demo").hub_name is None


@pytest.mark.parametrize("model", ["./org/name", "name", "org/name/more"])
def test_what_is_neither_says_both_ways(model: str) -> None:
    with pytest.raises(Refused) as refused:
        load_settings({"model": model})
    assert f"there is no folder '{model}'" in str(refused.value)
    assert "a GGUF file, or a hub's name as org/name[@revision]" in str(refused.value)


def test_a_file_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("m.gguf", "m.bin"):
        (tmp_path / "models" / name).write_text("", "utf-8")
    assert load_settings({"model": "models/m.gguf"}).hub_name is None
    with pytest.raises(Refused, match="there is no folder"):
        load_settings({"model": "models/m.bin"})


def test_other_models_do_not_wait_for_the_hubs_library() -> None:
    code = (
        "import sys; from moestro.server.facts import load_settings;"
        "load_settings({'model': 'demo'}).served_name; load_settings({'model': '/'}).served_name;"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
