"""What the cache folder keeps: listed, and never removed while it is in use."""

import os
from pathlib import Path

import pytest

import tiny
from engine_kit import opened
from moestro.engine import InUse, StartError, fetched_models, kept_models, remove, remove_fetched
from moestro.engine.facts import EngineConfig
from moestro.engine.kept_folders import LOCK_NAME, FolderLock, use_folder


def test_a_start_leaves_a_note_and_holds_the_folder(tmp_path: Path) -> None:
    folder, cache = tiny.build("mixtral", tmp_path / "model"), tmp_path / "cache"
    assert kept_models(cache) == []
    with opened(folder, cache), opened(folder, cache, expert_format="int8"):
        (kept,) = kept_models(cache)
        assert (kept.model_path, kept.family, kept.lane) == (folder, "mixtral", "packed")
        assert set(kept.formats) == {"native", "int8"} and kept.in_use
        with pytest.raises(InUse, match="stop the server"):
            remove(kept)
        assert kept_models(cache)[0].formats == kept.formats
    (kept,) = kept_models(cache)
    packs = sum(path.stat().st_size for path in kept.folder.glob("*.pack"))
    assert not kept.in_use and kept.size_bytes >= packs > 0
    assert remove(kept) == kept.size_bytes and not kept.folder.exists()
    assert kept_models(cache) == []
    with opened(folder, cache):  # and it starts again
        assert kept_models(cache)[0].in_use


def test_a_failed_start_lets_the_folder_go(tmp_path: Path) -> None:
    folder, cache = tiny.build("mixtral", tmp_path / "model"), tmp_path / "cache"
    with opened(folder, cache):
        pass
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(StartError):
        opened(folder, cache, expert_format="int8").__enter__()
    assert not kept_models(cache)[0].in_use


def test_folders_without_a_note_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "packs" / "old-00000000"
    folder.mkdir(parents=True)
    (folder / "native.pack").write_bytes(b"0" * 5000)
    for note in (None, "[]", "{", '{"model": 4}'):
        if note is not None:
            (folder / "model.json").write_text(note)
        (kept,) = kept_models(tmp_path)
        assert (kept.model_path, kept.family, kept.formats) == (None, "", ("native",))
        assert kept.size_bytes >= 5000 and kept.last_used_s > 0
    (tmp_path / "packs" / "a-file").write_text("")
    (tmp_path / "packs" / "a-link").symlink_to(tmp_path)
    assert len(kept_models(tmp_path)) == 1


def test_a_lock_of_a_folder_that_was_removed_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, looked = tmp_path / "packs" / "one", []

    def removed_once(fd: int, path: Path) -> bool:
        looked.append(fd)
        if len(looked) == 1:
            path.unlink()
        return path.exists() and os.path.samestat(os.fstat(fd), path.stat())

    monkeypatch.setattr("moestro.engine.kept_folders._is_at", removed_once)
    lock = FolderLock(folder)
    assert len(looked) == 2 and kept_models(tmp_path)[0].in_use
    lock.close()
    lock.close()
    assert not kept_models(tmp_path)[0].in_use


def test_a_fetched_model_that_is_served_stays(tmp_path: Path) -> None:
    folder = tiny.build("mixtral", tmp_path / "models" / "demo")
    (tmp_path / "models" / ".scratch").mkdir()
    (fetched,) = fetched_models(tmp_path)
    assert (fetched.name, fetched.family) == ("demo", "mixtral") and fetched.size_bytes > 1000
    lock = use_folder(EngineConfig(folder, tmp_path), "mixtral", "packed")
    with pytest.raises(InUse):
        remove_fetched(fetched, kept_models(tmp_path))
    lock.close()
    assert remove_fetched(fetched, kept_models(tmp_path)) == fetched.size_bytes
    assert not folder.exists() and fetched_models(tmp_path) == []
    assert (kept_models(tmp_path)[0].folder / LOCK_NAME).exists()
