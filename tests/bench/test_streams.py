"""The memory's ceiling: what is read, and which way counts."""

import ctypes
import struct
from pathlib import Path

import pytest
from full.streams import AHEAD_BYTES, HUGE_BYTES, PAGES, STREAMS, NoCompiler, blocks, build, measure


def test_every_way_is_timed_and_the_best_named() -> None:
    seen: list[tuple[int, int, int]] = []

    def read(address: int, count: int, streams: int, ahead: int) -> int:
        assert address % HUGE_BYTES == 0
        seen.append((count, streams, ahead))
        return 0

    found = measure(read, 2, 4 * HUGE_BYTES)
    assert len(found.ways) == len(STREAMS) * len(AHEAD_BYTES) * len(PAGES)
    assert {streams for _, streams, _ in seen} == set(STREAMS)
    assert {count for count, _, _ in seen} == {2 * HUGE_BYTES}
    assert found.best == max(found.ways.values()) == found.ways[found.best_way]


def test_the_blocks_are_written_and_apart() -> None:
    with blocks(2, HUGE_BYTES, "normal") as addresses:
        assert abs(addresses[0] - addresses[1]) >= HUGE_BYTES
        for address in addresses:
            assert ctypes.string_at(address + HUGE_BYTES - 1, 1) == b"\x01"


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("ahead", AHEAD_BYTES)
def test_every_byte_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, streams: int, ahead: int
) -> None:
    """The reader adds without carry: a bit that was not read, or twice, would show."""
    folder = tmp_path_factory.getbasetemp() / "streams"
    try:
        read = build(folder)
    except NoCompiler as error:
        pytest.skip(str(error))
    count = 64 * 8 * 4 * 3
    with blocks(1, HUGE_BYTES, "normal") as (address,):
        ctypes.memset(address, 0, count)
        assert read(address, count, streams, ahead) == 0
        for place in range(0, count, 264):
            word = struct.pack("<Q", 1 << 40)
            ctypes.memmove(address + place, word, 8)
            assert read(address, count, streams, ahead) == 1 << 40
            ctypes.memset(address + place, 0, 8)


def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompiler, match="install gcc"):
        build(tmp_path / "built")
