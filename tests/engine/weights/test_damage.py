"""Each thing that may lie in a folder instead of a model is named, with its cause and the cure."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from engine_kit import opened, run_logits
from moestro.engine import ModelNotFound, ModelRefused, StartError, Tokenizer
from moestro.engine.model.meta_model import build_meta_model
from moestro.engine.weights import Checkpoint

ONE = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 4976698672\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def whole_sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_sharded") / "model"
    shutil.copytree(whole, folder)
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    keys = sorted(tensors)
    of_file = {FIRST: keys[: len(keys) // 2], SECOND: keys[len(keys) // 2 :]}
    for name, part in of_file.items():
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
    write_index(folder, {key: name for name, part in of_file.items() for key in part})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded(whole_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_sharded, tmp_path / "model"))


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def understood(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.split_keys(build_meta_model(checkpoint, torch.float32))
    return checkpoint


def refusal(folder: Path, kind: type[StartError] = ModelRefused) -> str:
    """What a start would say of it."""
    with pytest.raises(kind) as caught:
        understood(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_file_is_named_with_both_sizes(lost: int, folder: Path) -> None:
    data = (folder / ONE).read_bytes()
    (folder / ONE).write_bytes(data[:-lost])
    assert refusal(folder) == (
        f"{folder / ONE} is truncated: it has {len(data) - lost} bytes of the {len(data)} that its"
        " header speaks of; fetch it again"
    )


def test_a_truncated_file_with_numbers_that_are_not_carried(folder: Path) -> None:
    tensors = {"a": torch.zeros(64).to(torch.float8_e4m3fn)}
    save_file(tensors, folder / ONE, {"format": "pt"})
    data = (folder / ONE).read_bytes()
    (folder / ONE).write_bytes(data[:-1])
    assert f"it has {len(data) - 1} bytes of the {len(data)} that" in refusal(folder)
    (folder / ONE).write_bytes(data + b"\0")
    assert f"it has {len(data) + 1} bytes, and its header speaks of {len(data)}" in refusal(folder)


@pytest.mark.parametrize("kept", [1, 8, 9, 200])
def test_a_file_truncated_in_its_header(kept: int, sharded: Path) -> None:
    data = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(data[:kept])
    header_ends = 8 + int.from_bytes(data[:8], "little") if kept >= 8 else 8 + data[0]
    words = f"truncated: it has {kept} bytes, and its header alone ends at {header_ends};"
    assert f"{SECOND} is {words}" in refusal(sharded)


def test_a_few_bytes_behind_the_data_are_warned_of(
    folder: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (folder / ONE).open("ab") as file:
        file.write(b"\0" * 17)
    found = []
    for place in (whole, folder):
        with opened(place, tmp_path / "cache") as loaded:
            found.append(run_logits(loaded, [[(1, [5, 6, 7])]])[0])
    assert torch.equal(*found)
    assert said(caplog) == [f"{folder / ONE} has 17 bytes behind its data; they are not read"]


def test_many_bytes_behind_the_data_are_no_padding(folder: Path) -> None:
    """As a download leaves them that went on at a wrong place."""
    size = (folder / ONE).stat().st_size
    with (folder / ONE).open("ab") as file:
        file.write(b"\0" * 5000)
    assert f"it has {size + 5000} bytes, and its header speaks of {size}" in refusal(folder)


def test_padding_does_not_hide_gaps_in_the_header(folder: Path) -> None:
    data = (folder / ONE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    del header[next(key for key, entry in header.items() if entry.get("data_offsets", [1])[0] == 0)]
    text = json.dumps(header).encode()
    (folder / ONE).write_bytes(len(text).to_bytes(8, "little") + text + data[end:] + b"\0")
    assert "is not a whole safetensors file" in refusal(folder)


def test_something_else_is_no_safetensors_file(folder: Path) -> None:
    (folder / ONE).write_bytes(b"GGUF\x03\x00\x00\x00" * 100)
    assert f"{ONE} is not a safetensors file: its 800 bytes begin with no header" in refusal(folder)


def test_a_missing_shard_is_named_and_counted(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    words = f"shard {SECOND} is missing (1 of the 2 that {INDEX} names are here); fetch it again"
    assert refusal(sharded) == f"{sharded}: {words}"


def test_a_shard_that_the_index_does_not_name_is_warned_of(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = "model-00003-of-00003.safetensors"
    save_file({"model.norm.weight": torch.zeros(64)}, sharded / extra)
    understood(sharded)
    assert said(caplog) == [f"{sharded}: {extra} not read, because {INDEX} does not name it"]


def test_shards_beside_a_single_file_are_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, folder / SECOND)
    understood(folder)
    assert said(caplog) == [f"{folder}: {SECOND} not read, because the model is in {ONE}"]


def test_tensors_of_a_shard_that_the_index_forgets_are_missing(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = read_index(sharded)
    write_index(sharded, {key: name for key, name in index.items() if name == FIRST})
    assert "tensors are missing in the files: " in refusal(sharded)
    assert [line for line in said(caplog) if SECOND in line]


def test_a_tensor_that_no_shard_has_is_named_with_its_shard(sharded: Path) -> None:
    write_index(sharded, read_index(sharded) | {"model.extra.weight": SECOND})
    found = refusal(sharded)
    assert f"{INDEX}: tensors of the index are missing in its files" in found
    assert f"model.extra.weight (of {SECOND})" in found


def test_an_index_that_is_wrong_about_the_shard_is_warned_of(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = read_index(sharded)
    key = next(key for key, name in index.items() if name == FIRST)
    write_index(sharded, index | {key: SECOND})
    understood(sharded)
    assert said(caplog) == [
        f"{sharded / INDEX} is wrong about where tensors are: {key} ({FIRST}, not {SECOND})"
    ]


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_a_wrong_shape_is_refused_before_anything_is_read(key: str, folder: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][:32].clone()

    edit(folder / ONE, cut)
    found = refusal(folder)
    assert f"{folder / ONE}: {key} is (32" in found
    assert "in the file, (64" in found


def test_an_expert_that_is_unlike_the_others_is_named(folder: Path) -> None:
    key = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key.format(3)] = tensors[key.format(3)][:32].clone()

    edit(folder / ONE, cut)
    words = f"{folder / ONE}: {key.format(3)} is (32, 64), and {key.format(0)} (64, 64)"
    assert words in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_dense_tensor_in_a_dtype_of_quantized_weights_is_refused(
    dtype: torch.dtype, folder: Path
) -> None:
    """Taken as they stand, such numbers would be weights without their scales."""
    key = "model.layers.1.self_attn.q_proj.weight"

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key].to(dtype)

    edit(folder / ONE, narrow)
    found = refusal(folder)
    assert f"{folder / ONE}: tensor {key} is " in found
    assert "weights must be F64, F32, F16, BF16" in found


NAMES = [ONE, "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def start_refusal(folder: Path, kind: type[StartError] = ModelRefused) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint(folder).close()
        Tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja", "special_tokens_map.json"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, folder: Path) -> None:
    (folder / name).write_bytes(POINTER)
    assert start_refusal(folder) == (
        f"{folder / name} is a Git LFS pointer of {len(POINTER)} bytes, not the file, of 4976698672"
        " bytes, that it stands for; fetch that with `git lfs pull` in the folder, or with"
        " `hf download` (once `huggingface-cli download`)"
    )


@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja"])
def test_a_web_page_is_called_one(name: str, folder: Path) -> None:
    (folder / name).write_bytes(PAGE)
    words = f"{folder / name} is a web page of {len(PAGE)} bytes (HTML), as a failed download"
    assert words in start_refusal(folder)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_file_is_called_empty(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"")
    assert f"{folder / name} is empty (0 bytes without content)" in start_refusal(folder)


@pytest.mark.parametrize("name", NAMES[1:])
def test_half_a_json_file_is_named(name: str, folder: Path) -> None:
    half = (folder / name).read_bytes()[:20]
    (folder / name).write_bytes(half)
    found = start_refusal(folder)
    assert f"{folder / name} is not a" in found
    assert "no JSON, in its 20 bytes (" in found


def test_an_empty_template_says_nothing_and_is_none(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"")
    Tokenizer(folder)


@pytest.mark.parametrize("stand_in", [POINTER, PAGE, b"", b"{"])
def test_an_index_that_is_something_else(stand_in: bytes, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(stand_in)
    assert str(sharded / INDEX) in refusal(sharded)


@pytest.mark.parametrize("name", [SECOND, INDEX])
def test_a_shard_that_is_a_pointer(name: str, sharded: Path) -> None:
    (sharded / name).write_bytes(POINTER)
    assert f"{sharded / name} is a Git LFS pointer" in refusal(sharded)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / ONE).unlink()
    os.mkfifo(folder / ONE)
    assert refusal(folder) == f"{folder / ONE} is not a regular file; fetch it again"


@pytest.mark.parametrize("name", NAMES)
def test_a_link_to_nowhere_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/00ff")
    assert start_refusal(folder, ModelNotFound) == (
        f"{folder / name} is a link to ../../blobs/00ff, which does not exist; copy the folder"
        " again with its links followed (`cp -rL`, `rsync -rL`), or download it again"
    )


def as_snapshot(folder: Path, root: Path) -> Path:
    """The same files in the layout of the hub's cache."""
    place = root / "models--org--name"
    snapshot, blobs = place / "snapshots" / "0123abc", place / "blobs"
    for part in (snapshot, blobs):
        part.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hub_is_a_model(folder: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(folder, tmp_path)
    understood(snapshot)
    assert Tokenizer(snapshot).stop_ids == Tokenizer(snapshot).stop_ids != frozenset()


def test_a_snapshot_without_its_blobs_is_called_one(folder: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(folder, tmp_path)
    copy = shutil.copytree(snapshot, tmp_path / "elsewhere" / "model", symlinks=True)
    found = refusal(copy, ModelNotFound)
    assert f"{copy} has only links without their files (5; config.json leads to ../../" in found
    assert "a hub snapshot that was copied without its blobs" in found
    assert "`cp -rL`, `rsync -rL`" in found
