"""Huge pages are asked for only while they lie free."""

import mmap
from pathlib import Path

import pytest

from moestro.cache.pack.huge_pages import LEAST_BYTES, ask_for_huge_pages, free_huge_bytes

BUDDIES = """\
Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3
Node 0, zone   Normal   1101    857    631    693    661    172    810   1007    628      2    157
"""


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="the sample is of 4 KiB pages")
def test_free_blocks_of_two_mebibytes_and_more_count(tmp_path: Path) -> None:
    path = tmp_path / "buddyinfo"
    path.write_text(BUDDIES)
    assert free_huge_bytes(path) == (1 + 2) * (2 << 20) + (3 + 157) * (4 << 20)


@pytest.mark.parametrize("text", ["", "Node 0, zone DMA x y", "nonsense"])
def test_what_is_not_understood_is_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "buddyinfo"
    path.write_text(text)
    assert free_huge_bytes(path) == 0
    assert free_huge_bytes(tmp_path / "missing") == 0


def test_nothing_is_asked_for_where_little_lies_free_or_little_is_wanted() -> None:
    with mmap.mmap(-1, LEAST_BYTES) as large, mmap.mmap(-1, LEAST_BYTES // 2) as small:
        assert not ask_for_huge_pages(large, LEAST_BYTES)
        assert not ask_for_huge_pages(small, 10 * LEAST_BYTES)
