"""`moestro models`: what is listed, and what `rm` frees and refuses."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from moestro.engine import EngineConfig
from moestro.engine.kept_folders import use_folder
from moestro.server.commands.models import run_models, run_remove
from moestro.server.facts import Refused


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command sets up the process' logging."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers = before
    root.setLevel(level)
    logging.getLogger("moestro").setLevel(logging.NOTSET)
    logging.captureWarnings(False)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def repository(hub_cache: Path) -> Path:
    """As the store leaves one: a model, and one that another program fetched."""
    repository = hub_cache / "models--org--tiny"
    tiny.build("mixtral", repository / "snapshots" / ("0" * 40))
    tiny.build("mixtral", hub_cache / "models--other--programs" / "snapshots" / ("1" * 40))
    lock = hub_cache / ".locks" / "models--org--tiny" / "moestro.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return repository


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Packs of a model that is there, of one that is gone, and a fetched one."""
    model = tiny.build("mixtral", tmp_path / "my-model")
    for path in (model, tmp_path / "gone"):
        use_folder(EngineConfig(path, tmp_path / "cache"), "mixtral", "packed").close()
    tiny.build("olmoe", tmp_path / "cache" / "models" / "fetched")
    return tmp_path / "cache"


@pytest.fixture
def listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[Any]]:
    def rows() -> list[Any]:
        run_models(cache, as_json=True)
        return list(json.loads(capsys.readouterr().out))

    return rows


def test_everything_is_listed_with_its_verdict(
    cache: Path, listed: Callable[[], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = listed()
    assert [row["kind"] for row in rows] == ["model", "packs", "packs"]
    assert {row["in_use"] for row in rows} == {False} and all(row["size_bytes"] for row in rows)
    run_models(cache, as_json=False)
    said = capsys.readouterr().out
    assert "fetched (model): olmoe, " in said
    assert "(packs): mixtral, " in said and "lane packed" in said
    assert f"of {cache.parent / 'my-model'}" in said
    assert "fits: " in said and "32 of 32 experts resident" in said
    assert "not there any more: the packs can go" in said


def test_rm_frees_what_it_names_all_or_nothing(
    cache: Path, listed: Callable[[], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [row["name"] for row in listed()]
    with pytest.raises(Refused, match="nothing called 'nothing' is kept in .*; there is fetched, "):
        run_remove([names[1], "nothing"], cache)
    lock = use_folder(EngineConfig(cache.parent / "gone", cache), "mixtral", "packed")
    with pytest.raises(Refused, match="gone-.* is in use: stop the server"):
        run_remove(names, cache)
    assert len(listed()) == 3
    lock.close()
    run_remove([*names, names[0]], cache)
    assert capsys.readouterr().out.count(" freed") == 3
    assert (cache.parent / "my-model" / "config.json").exists()
    run_models(cache, as_json=False)
    assert capsys.readouterr().out.startswith("nothing is kept in")


@pytest.mark.slow
def test_the_command_line_reaches_it(cache: Path) -> None:
    command = [sys.executable, "-P", "-m", "moestro.server", "models"]
    flag = ("--cache-dir", str(cache))
    done = subprocess.run([*command, *flag], capture_output=True, text=True, check=True)
    assert "fetched (model): olmoe" in done.stdout
    done = subprocess.run(
        [*command, "rm", "fetched", *flag], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fetched: ") and done.stdout.rstrip().endswith("freed")


def test_what_was_fetched_from_the_hub_is_listed_and_freed(
    tmp_path: Path,
    repository: Path,
    hub_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    run_models(cache, as_json=False)
    said = capsys.readouterr().out
    assert "org/tiny (hub): mixtral, " in said and "32 of 32 experts resident" in said
    assert "other/programs" not in said
    (snapshot,) = (repository / "snapshots").iterdir()
    lock = use_folder(EngineConfig(snapshot, cache), "mixtral", "packed")
    with pytest.raises(Refused, match="org/tiny is in use: stop the server"):
        run_remove(["org/tiny"], cache)
    lock.close()
    run_remove(["org/tiny"], cache)
    assert capsys.readouterr().out.startswith("org/tiny: ")
    assert not repository.exists()
    assert (hub_cache / "models--other--programs").exists()
    run_models(cache, as_json=True)
    assert [row["kind"] for row in json.loads(capsys.readouterr().out)] == ["packs"]


def test_a_download_that_was_cut_is_listed_and_freed(
    tmp_path: Path, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs = hub_cache / "models--org--cut" / "blobs"
    lock = hub_cache / ".locks" / "models--org--cut" / "moestro.lock"
    for folder in (blobs, lock.parent):
        folder.mkdir(parents=True)
    lock.touch()
    (blobs / "abc.moestro-partial").write_bytes(bytes(4096))
    run_models(tmp_path / "cache", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["size_bytes"]) == ("org/cut", 4096)
    assert "a download that was cut" in row["verdict"]
    run_remove(["org/cut"], tmp_path / "cache")
    assert "4 KiB freed" in capsys.readouterr().out
