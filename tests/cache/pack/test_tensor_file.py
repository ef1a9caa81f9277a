"""Named tensors in one file: bit by bit the same again, or a named error."""

import fcntl
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch

from moestro.cache import PackInvalid, PackUnwritable, holds_tensors, read_tensors, write_tensors

KEY = "whose they are"


def quiet(done: int, total: int) -> None:
    """A progress bar for nobody."""


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tied = torch.randn(33, 7)
    return {
        "values": torch.randint(-128, 128, (301, 13), dtype=torch.int8),
        "none": torch.empty(0, 4),
        "number": torch.tensor(2.5),
        "large": torch.randn(1500, 1601).to(torch.bfloat16),  # ends inside a chunk
        "larger": torch.randn(3000, 1601),  # begins in one and ends in a later one
        "turned": torch.randn(5, 9).t(),
        "tied": tied,
        "again": tied,
        "flags": torch.tensor([True, False, True]),
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "some.tensors"
    assert write_tensors(path, KEY, samples(), quiet)
    return path


def test_what_is_read_is_what_was_written(written: Path) -> None:
    found, wanted = read_tensors(written, KEY), samples()
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() % 64 == 0
    assert found["tied"] is found["again"]
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_file_of_another_owner_is_refused(written: Path) -> None:
    with pytest.raises(PackInvalid, match="another model, format or version"):
        read_tensors(written, "somebody else")
    assert holds_tensors(written, KEY)
    assert not holds_tensors(written, "somebody else")
    assert not holds_tensors(written.with_name("none"), KEY)


def test_what_two_keys_share_is_not_said(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    write_tensors(path, "mine, in rows", {"x": torch.zeros(1)}, quiet)
    with pytest.raises(PackInvalid, match=r"version \('in rows', not 'in tiles, twice'\)$"):
        read_tensors(path, "mine, in tiles, twice")


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"key": KEY},
        {"key": KEY, "tensors": [["x"]], "sums": []},
        {"key": KEY, "tensors": [["x", "float99", [1], 0]], "sums": []},
        {"key": KEY, "tensors": [["x", "int8", ["1"], 0]], "sums": []},
        {"key": KEY, "tensors": [["x", "int8", [-1], 0]], "sums": []},
        {"key": KEY, "tensors": [["x", "int8", [1], -64]], "sums": []},
        {"key": KEY, "tensors": [["x", "int8", [1], None]], "sums": []},
        {"key": KEY, "tensors": [], "sums": ["zz"]},
    ],
)
def test_a_header_that_says_something_else_is_refused(record: object, tmp_path: Path) -> None:
    """Even one whose own checksum is right."""
    path, text = tmp_path / "other.tensors", json.dumps(record).encode()
    preamble = struct.pack("<8sIIQ", b"moestens", 1, zlib.crc32(text), len(text))
    path.write_bytes((preamble + text).ljust(4096, b"\0"))
    with pytest.raises(PackInvalid, match="no header of this version"):
        read_tensors(path, KEY)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.02, 0.5, 0.9])
def test_a_flipped_bit_is_found(share: float, written: Path) -> None:
    with written.open("r+b") as file:
        place = int(share * written.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(PackInvalid):
        read_tensors(written, KEY)


@pytest.mark.parametrize("size", [0, 20, 4096, 12288, 9_000_000, 20_000_000])
def test_a_file_that_was_cut_is_refused(size: int, written: Path) -> None:
    os.truncate(written, size)
    with pytest.raises(PackInvalid):
        read_tensors(written, KEY)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackInvalid, match="No such file"):
        read_tensors(tmp_path / "none", KEY)


def test_whoever_gives_up_leaves_what_was_there(written: Path) -> None:
    before = written.read_bytes()

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(written, "new", samples(), stop)
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "some.tensors"
    path.with_name("some.tensors.partial").write_bytes(b"half" * 10_000_000)
    assert write_tensors(path, KEY, samples(), quiet)
    assert torch.equal(read_tensors(path, KEY)["larger"], samples()["larger"])
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_while_another_process_writes_nothing_is_done(tmp_path: Path) -> None:
    path = tmp_path / "some.tensors"
    with path.with_name("some.tensors.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not write_tensors(path, KEY, samples(), quiet)
    assert not path.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackUnwritable, match="No such file"):
        write_tensors(tmp_path / "none" / "some.tensors", KEY, samples(), quiet)
